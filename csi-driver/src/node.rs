//! CSI's Node service: checks requests, and hands them on.

use std::path::{Path, PathBuf};

use tonic::{Request, Response, Status};

use crate::{
    binds,
    calls::Calls,
    capability::Capability,
    error::VolumeError,
    health,
    proto::csi::{
        NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
        NodeGetStorageHealthRequest, NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest,
        NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
        NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest, NodeStageVolumeResponse,
        NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
        VolumeHealth, node_server,
        node_service_capability::{self, Rpc, rpc},
    },
    source::{Source, is_inline},
    volumes::{PublishRequest, StageRequest, Volumes, is_component},
};

/// Longest volume id (CSI's general limit).
const MAX_ID: usize = 128;
/// Longest path (PATH_MAX).
const MAX_PATH: usize = 4096;
/// What can be called.
const CAPABILITIES: [rpc::Type; 5] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::GetVolumeHealth,
    rpc::Type::GetStorageHealth,
];

/// The volumes of this node.
pub struct Node {
    /// The workers of calls.
    pub calls: Calls,
    /// The node's name.
    pub id: String,
}

fn check_id(volume: &str) -> Result<String, VolumeError> {
    let valid = (1..=MAX_ID).contains(&volume.len()) && !volume.bytes().any(|byte| byte.is_ascii_control());
    if valid {
        return Ok(volume.to_owned());
    }
    Err(VolumeError::Invalid(format!("a volume id of 1 to {MAX_ID} printable bytes is required")))
}

fn check_path(what: &str, path: &str) -> Result<PathBuf, VolumeError> {
    let mut components = Path::new(path).components();
    let valid = path.len() <= MAX_PATH && !path.contains('\0') && path.starts_with('/');
    if valid && components.all(|component| component != std::path::Component::ParentDir) {
        return Ok(PathBuf::from(path));
    }
    Err(VolumeError::Invalid(format!("an absolute {what} without '..' is required")))
}

impl StageRequest {
    fn check(request: &NodeStageVolumeRequest) -> Result<Self, VolumeError> {
        Ok(Self {
            volume: check_id(&request.volume_id)?,
            stage: check_path("staging_target_path", &request.staging_target_path)?,
            capability: Capability::check(request.volume_capability.as_ref())?,
            source: Source::check(&request.volume_context, &request.secrets)?,
        })
    }
}

impl PublishRequest {
    fn check(request: &NodePublishVolumeRequest) -> Result<Self, VolumeError> {
        let volume = check_id(&request.volume_id)?;
        let target = check_path("target_path", &request.target_path)?;
        let capability = Capability::check(request.volume_capability.as_ref())?;
        let inline = is_inline(&request.volume_context);
        let stage = match request.staging_target_path.as_str() {
            _ if inline && !is_component(&volume) => {
                return Err(VolumeError::Invalid(format!("an inline volume cannot be called '{volume}'")));
            }
            _ if inline => None,
            "" => return Err(VolumeError::Precondition("a staging_target_path is required".to_owned())),
            stage => Some(check_path("staging_target_path", stage)?),
        };
        let source = Source::check(&request.volume_context, &request.secrets)?;
        Ok(Self { volume, stage, target, capability, readonly: request.readonly, source })
    }
}

/// How a volume is, as it is seen at the places where it is mounted.
fn volume_health(volumes: &Volumes, request: &NodeGetVolumeHealthRequest) -> Result<VolumeHealth, VolumeError> {
    let volume = check_id(&request.volume_id)?;
    let status = volumes.stages().volume(&volume)?;
    for path in [&request.volume_publish_path, &request.staging_target_path] {
        let Some(place) = (if path.starts_with('/') { binds::resolve(Path::new(path))? } else { None }) else {
            continue;
        };
        let device = status.as_ref().map(|status| status.mount.device);
        if binds::look(&place)?.is_some_and(|top| binds::is_ours(&top) && Some(top.device) != device) {
            return Ok(health::dead_mount(&volume, &place));
        }
    }
    let status = status.ok_or_else(|| VolumeError::NotFound(format!("volume '{volume}' is not on this node")))?;
    Ok(health::volume(&volume, status.health.as_ref()))
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let call = async {
            let stage = StageRequest::check(&request)?;
            self.calls.change(stage.volume.clone(), move |volumes| volumes.stage(&stage)).await?;
            Ok(NodeStageVolumeResponse {})
        };
        self.calls.observe("NodeStageVolume", &request.volume_id, call).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let call = async {
            let volume = check_id(&request.volume_id)?;
            let stage = check_path("staging_target_path", &request.staging_target_path)?;
            self.calls.change(volume.clone(), move |volumes| volumes.unstage(&volume, &stage)).await?;
            Ok(NodeUnstageVolumeResponse {})
        };
        self.calls.observe("NodeUnstageVolume", &request.volume_id, call).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let call = async {
            let publish = PublishRequest::check(&request)?;
            self.calls.change(publish.volume.clone(), move |volumes| volumes.publish(&publish)).await?;
            Ok(NodePublishVolumeResponse {})
        };
        self.calls.observe("NodePublishVolume", &request.volume_id, call).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let call = async {
            let volume = check_id(&request.volume_id)?;
            let target = check_path("target_path", &request.target_path)?;
            self.calls.change(volume.clone(), move |volumes| volumes.unpublish(&volume, &target)).await?;
            Ok(NodeUnpublishVolumeResponse {})
        };
        self.calls.observe("NodeUnpublishVolume", &request.volume_id, call).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let call = async {
            let volume = check_id(&request.volume_id)?;
            if request.volume_path.is_empty() {
                return Err(VolumeError::Invalid("a volume_path is required".to_owned()).into());
            }
            let path = PathBuf::from(&request.volume_path);
            let usage = self.calls.look(move |volumes| volumes.usage(&volume, &path)).await?;
            Ok(NodeGetVolumeStatsResponse { usage })
        };
        self.calls.observe("NodeGetVolumeStats", &request.volume_id, call).await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        let call = async {
            let health = self.calls.look(move |volumes| volume_health(volumes, &request)).await?;
            Ok(NodeGetVolumeHealthResponse { volume_health: Some(health) })
        };
        self.calls.observe("NodeGetVolumeHealth", &volume, call).await
    }

    async fn node_get_storage_health(
        &self,
        _request: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        let call = async {
            let status = self.calls.look(|volumes| volumes.stages().status()).await?;
            Ok(NodeGetStorageHealthResponse { backend_health: health::storage(&status).into_iter().collect() })
        };
        self.calls.observe("NodeGetStorageHealth", "", call).await
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        // As many volumes as there is memory for: no limit of ours.
        Ok(Response::new(NodeGetInfoResponse { node_id: self.id.clone(), max_volumes_per_node: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths() {
        for id in ["csi-0af3", "7f7a1f0e-8f50", "with / anything", &"x".repeat(128)] {
            assert_eq!(check_id(id).unwrap(), id);
        }
        for id in ["", "a\nb", "a\0", &"x".repeat(129)] {
            assert!(matches!(check_id(id), Err(VolumeError::Invalid(_))), "{id:?}");
        }
        for path in ["/", "/var/lib/kubelet/x", "/a//b/", "/a..b/..."] {
            assert_eq!(check_path("p", path).unwrap(), PathBuf::from(path));
        }
        for path in ["", "a", "./a", "/a/../b", "/..", "/a\0b", &format!("/{}", "x".repeat(4096))] {
            assert!(matches!(check_path("p", path), Err(VolumeError::Invalid(_))), "{path:?}");
        }
    }

    #[test]
    fn inline_volumes_are_directories() {
        assert!(is_component("csi-0af3") && is_component("a.b_C"));
        assert!(!is_component("") && !is_component("a/b") && !is_component("..") && !is_component(".a"));
    }
}
