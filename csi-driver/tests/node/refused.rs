//! Calls that are refused, and with which code.

use forebay_csi::proto::csi::{
    ControllerGetCapabilitiesRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, VolumeCapability,
    controller_client::ControllerClient,
    volume_capability::{AccessMode, AccessType, BlockVolume, access_mode::Mode},
};
use tonic::Code;

use crate::rig::{KEY, Rig, can_mount, capability, mount_foreign, read, text};

#[tokio::test]
async fn requests_that_say_too_little_or_too_much() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    let block = VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode { mode: 1 }),
    };
    type Change = Box<dyn Fn(&mut NodeStageVolumeRequest)>;
    let changes: Vec<(Change, &str)> = vec![
        (Box::new(|r| r.volume_id.clear()), "volume id"),
        (Box::new(|r| r.volume_id = "x".repeat(129)), "volume id"),
        (Box::new(|r| r.staging_target_path.clear()), "staging_target_path"),
        (Box::new(|r| r.staging_target_path = "relative".into()), "staging_target_path"),
        (Box::new(|r| r.staging_target_path = "/a/../b".into()), "staging_target_path"),
        (Box::new(|r| r.volume_capability = None), "capability"),
        (Box::new(move |r| r.volume_capability = Some(block.clone())), "block"),
        (Box::new(|r| r.volume_capability = Some(capability(Mode::Unknown, &[]))), "access mode"),
        (Box::new(|r| r.volume_capability = Some(capability(Mode::SingleNodeWriter, &["rw"]))), "'rw'"),
        (Box::new(|r| r.secrets.clear()), "'key'"),
        (Box::new(|r| drop(r.secrets.insert("key".into(), "hunter2".into()))), "'key'"),
        (Box::new(|r| drop(r.secrets.insert("service".into(), "nowhere".into()))), "'nowhere'"),
        (Box::new(|r| drop(r.volume_context.remove("dataset"))), "'dataset'"),
        (Box::new(|r| drop(r.volume_context.insert("name".into(), "a,b/c".into()))), "'a,b/c'"),
    ];
    for (change, named) in &changes {
        let mut request = rig.stage_request("v");
        change(&mut request);
        let error = rig.node().node_stage_volume(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains(named), "{named}: {error:?}");
    }
    type PublishChange = Box<dyn Fn(&mut NodePublishVolumeRequest)>;
    let changes: Vec<(PublishChange, Code, &str)> = vec![
        (Box::new(|r| r.volume_id.clear()), Code::InvalidArgument, "volume id"),
        (Box::new(|r| r.target_path.clear()), Code::InvalidArgument, "target_path"),
        (Box::new(|r| r.volume_capability = None), Code::InvalidArgument, "capability"),
        (Box::new(|r| r.staging_target_path.clear()), Code::FailedPrecondition, "staging_target_path"),
        (Box::new(|r| r.secrets.clear()), Code::InvalidArgument, "'key'"),
    ];
    for (change, code, named) in &changes {
        let mut request = rig.publish_request("v", "pod");
        change(&mut request);
        let error = rig.node().node_publish_volume(request).await.unwrap_err();
        assert_eq!(error.code(), *code, "{error:?}");
        assert!(error.message().contains(named), "{named}: {error:?}");
    }
    rig.assert_clean();
    let mut controller = ControllerClient::new(rig.channel.clone());
    let error = controller.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    let logged = rig.logged();
    assert!(logged.contains("refused") && !logged.contains("hunter2") && !logged.contains(KEY));
}

#[tokio::test]
async fn the_same_volume_for_another_use() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    let writer = Some(capability(Mode::SingleNodeSingleWriter, &[]));
    rig.stage("v").await.unwrap();
    rig.publish("v", "pod").await.unwrap();
    let mut node = rig.node();

    let other_use = NodeStageVolumeRequest { volume_capability: writer.clone(), ..rig.stage_request("v") };
    assert_eq!(node.node_stage_volume(other_use).await.unwrap_err().code(), Code::AlreadyExists);
    let mut other_dataset = rig.stage_request("v");
    other_dataset.volume_context.insert("name".into(), "default/others".into());
    assert_eq!(node.node_stage_volume(other_dataset).await.unwrap_err().code(), Code::AlreadyExists);
    let elsewhere = text(&rig.stage_path("elsewhere"));
    let other_place = NodeStageVolumeRequest { staging_target_path: elsewhere, ..rig.stage_request("v") };
    assert_eq!(node.node_stage_volume(other_place).await.unwrap_err().code(), Code::FailedPrecondition);
    let place = text(&rig.stage_path("v"));
    let other_volume = NodeStageVolumeRequest { staging_target_path: place, ..rig.stage_request("w") };
    assert_eq!(node.node_stage_volume(other_volume).await.unwrap_err().code(), Code::AlreadyExists);

    let other_use = NodePublishVolumeRequest { volume_capability: writer.clone(), ..rig.publish_request("v", "pod") };
    assert_eq!(node.node_publish_volume(other_use).await.unwrap_err().code(), Code::AlreadyExists);
    let other_use = NodePublishVolumeRequest { readonly: false, ..rig.publish_request("v", "pod") };
    assert_eq!(node.node_publish_volume(other_use).await.unwrap_err().code(), Code::AlreadyExists);
    read(&rig.target_path("pod")).await.unwrap();
    rig.unpublish("v", "pod").await.unwrap();

    // At one place only.
    let single = |pod| NodePublishVolumeRequest { volume_capability: writer.clone(), ..rig.publish_request("v", pod) };
    node.node_publish_volume(single("a")).await.unwrap();
    node.node_publish_volume(single("a")).await.unwrap();
    assert_eq!(node.node_publish_volume(single("b")).await.unwrap_err().code(), Code::FailedPrecondition);
    rig.unpublish("v", "a").await.unwrap();
    node.node_publish_volume(single("b")).await.unwrap();
    rig.unpublish("v", "b").await.unwrap();
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}

/// What is not ours is neither mounted over nor taken down.
#[tokio::test]
async fn places_that_are_taken() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    let (stage, target) = (rig.stage_path("v"), rig.target_path("pod"));
    mount_foreign(&stage);
    assert_eq!(rig.stage("v").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(rig.unstage("v").await.unwrap_err().code(), Code::FailedPrecondition);
    rustix::mount::unmount(&stage, rustix::mount::UnmountFlags::empty()).unwrap();
    rig.stage("v").await.unwrap();
    mount_foreign(&target);
    assert_eq!(rig.publish("v", "pod").await.unwrap_err().code(), Code::FailedPrecondition);
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    std::fs::remove_dir(&target).unwrap();
    std::fs::write(&target, "a file").unwrap();
    assert_eq!(rig.publish("v", "pod").await.unwrap_err().code(), Code::Internal);
    std::fs::remove_file(&target).unwrap();
    rig.publish("v", "pod").await.unwrap();
    rig.unpublish("v", "pod").await.unwrap();
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}
