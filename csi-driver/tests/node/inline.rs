//! Volumes that a pod declares itself.

use tonic::Code;

use crate::rig::{Rig, can_mount, mount_foreign, mounts_at, read};

#[tokio::test]
async fn published_and_gone() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    for (volume, pod) in [("csi-0a", "pod-a"), ("csi-0b", "pod-b")] {
        for _ in 0..2 {
            rig.publish_inline(volume, pod).await.unwrap();
            read(&rig.target_path(pod)).await.unwrap();
        }
        let stage = rig.plugin().join("inline").join(volume);
        assert_eq!(mounts_at(&stage).len(), 1);
        assert_eq!(rig.health(volume, &rig.target_path(pod)).await.unwrap().health_statuses, vec![]);
        rig.stats(volume, &rig.target_path(pod)).await.unwrap();
    }
    for (volume, pod) in [("csi-0a", "pod-a"), ("csi-0b", "pod-b"), ("csi-0b", "pod-b")] {
        rig.unpublish(volume, pod).await.unwrap();
    }
    rig.assert_clean();
}

/// What cannot be published is not left staged: nobody would unpublish it.
#[tokio::test]
async fn nothing_is_left_when_publishing_fails() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    let target = rig.target_path("pod");
    mount_foreign(&target);
    let error = rig.publish_inline("csi-0a", "pod").await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert_eq!(rig.mounts(), std::slice::from_ref(&target));
    // What is not ours is not touched.
    assert_eq!(rig.unpublish("csi-0a", "pod").await.unwrap_err().code(), Code::FailedPrecondition);
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    rig.unpublish("csi-0a", "pod").await.unwrap();
    rig.assert_clean();
}

#[tokio::test]
async fn what_a_pod_may_say() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    for (name, value, named) in [
        ("service", "evil.example:7400", "'service'"),
        ("dataset", "../other", "'../other'"),
        ("dataset", "default/other", "'default/other'"),
    ] {
        let mut request = rig.inline_request("csi-0a", "pod");
        request.volume_context.insert(name.to_owned(), value.to_owned());
        let error = rig.node().node_publish_volume(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(named), "{error:?}");
    }
    let mut request = rig.inline_request("../../x", "pod");
    let error = rig.node().node_publish_volume(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    request = rig.inline_request("csi-0a", "pod");
    request.secrets.clear();
    let error = rig.node().node_publish_volume(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(!rig.target_path("pod").exists());
    rig.assert_clean();
}
