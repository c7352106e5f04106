//! For what a volume is used: access mode, mount flags, block or file system.

use crate::{
    error::VolumeError,
    proto::csi::{
        VolumeCapability,
        volume_capability::{AccessType, access_mode::Mode},
    },
};

/// Flags that hold for every mount.
const ALWAYS: [&str; 5] = ["ro", "noatime", "nodiratime", "nosuid", "nodev"];
/// The flag that is applied to the pod's mount when it is asked for.
const NOEXEC: &str = "noexec";
/// What a PersistentVolume may say as `fsType`.
const FS_TYPE: &str = "forebay";

/// A checked capability. Every mode is served, read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    mode: Mode,
    /// Whether programs may not be run from the mount.
    pub noexec: bool,
}

impl Capability {
    /// Checks what was asked for.
    pub fn check(capability: Option<&VolumeCapability>) -> Result<Self, VolumeError> {
        let invalid = |text: String| Err(VolumeError::Invalid(text));
        let Some(VolumeCapability { access_type, access_mode }) = capability else {
            return invalid("a volume capability is required".to_owned());
        };
        let mode = match access_mode.map(|mode| Mode::try_from(mode.mode)) {
            None | Some(Ok(Mode::Unknown)) => return invalid("an access mode is required".to_owned()),
            Some(Err(_)) => return invalid("the access mode is none that this driver knows".to_owned()),
            Some(Ok(mode)) => mode,
        };
        let mount = match access_type {
            Some(AccessType::Mount(mount)) => mount,
            Some(AccessType::Block(_)) => {
                return invalid(
                    "a Dataset is a file system and cannot be a block device (volumeMode: Block)".to_owned(),
                );
            }
            None => return invalid("an access type is required".to_owned()),
        };
        if !["", FS_TYPE].contains(&mount.fs_type.as_str()) {
            return invalid(format!("fsType '{}' is not served; leave it out", mount.fs_type));
        }
        let mut noexec = false;
        for flag in &mount.mount_flags {
            match flag.as_str() {
                NOEXEC => noexec = true,
                flag if ALWAYS.contains(&flag) => {}
                flag => {
                    // What follows may be a secret.
                    let name = flag.split('=').next().unwrap_or_default();
                    return invalid(format!(
                        "mount option '{name}' is not served; a Dataset is always mounted {} and can be mounted {NOEXEC}",
                        ALWAYS.join(",")
                    ));
                }
            }
        }
        Ok(Self { mode, noexec })
    }

    /// Whether the volume may be published at more than one place of a node (table of CSI's NodePublishVolume).
    pub fn shared(self) -> bool {
        match self.mode {
            Mode::MultiNodeReaderOnly
            | Mode::MultiNodeSingleWriter
            | Mode::MultiNodeMultiWriter
            | Mode::SingleNodeMultiWriter => true,
            Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly | Mode::SingleNodeSingleWriter | Mode::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn capability(mode: i32, fs_type: &str, flags: &[&str]) -> VolumeCapability {
        let mount = MountVolume {
            fs_type: fs_type.to_owned(),
            mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        };
        VolumeCapability { access_type: Some(AccessType::Mount(mount)), access_mode: Some(AccessMode { mode }) }
    }

    #[test]
    fn every_mode_is_served() {
        for (mode, shared) in [
            (Mode::SingleNodeWriter, false),
            (Mode::SingleNodeReaderOnly, false),
            (Mode::MultiNodeReaderOnly, true),
            (Mode::MultiNodeSingleWriter, true),
            (Mode::MultiNodeMultiWriter, true),
            (Mode::SingleNodeSingleWriter, false),
            (Mode::SingleNodeMultiWriter, true),
        ] {
            let checked = Capability::check(Some(&capability(mode.into(), "", &[]))).unwrap();
            assert_eq!((checked.mode, checked.noexec, checked.shared()), (mode, false, shared));
        }
    }

    #[test]
    fn flags_that_hold_are_accepted() {
        let all = capability(1, "forebay", &["ro", "noatime", "nodiratime", "nosuid", "nodev", "noexec"]);
        assert!(Capability::check(Some(&all)).unwrap().noexec);
        assert!(!Capability::check(Some(&capability(1, "", &["ro", "ro"]))).unwrap().noexec);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let block = VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            access_mode: Some(AccessMode { mode: 1 }),
        };
        let no_type = VolumeCapability { access_type: None, access_mode: Some(AccessMode { mode: 1 }) };
        let no_mode = VolumeCapability { access_mode: None, ..capability(1, "", &[]) };
        for (capability, named) in [
            (None, "capability"),
            (Some(block), "block device"),
            (Some(no_type), "access type"),
            (Some(no_mode), "access mode"),
            (Some(capability(0, "", &[])), "access mode"),
            (Some(capability(99, "", &[])), "access mode"),
            (Some(capability(1, "ext4", &[])), "'ext4'"),
            (Some(capability(1, "", &["rw"])), "'rw'"),
            (Some(capability(1, "", &["ro", "allow_other"])), "'allow_other'"),
            (Some(capability(1, "", &["strictatime"])), "'strictatime'"),
            (Some(capability(1, "", &[""])), "''"),
            (Some(capability(1, "", &["password=hunter2"])), "'password'"),
        ] {
            let error = Capability::check(capability.as_ref()).unwrap_err();
            assert!(matches!(error, VolumeError::Invalid(_)), "{error:?}");
            assert!(error.to_string().contains(named), "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
