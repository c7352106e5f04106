//! Generates the gRPC code from `proto/` with a compiler written in Rust: no `protoc` on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["csi.proto", "pluginregistration.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // These hold secrets: their Debug is written by hand, and shows none.
        .skip_debug(["csi.v1.NodeStageVolumeRequest", "csi.v1.NodePublishVolumeRequest"])
        .compile_fds(descriptors)?;
    Ok(())
}
