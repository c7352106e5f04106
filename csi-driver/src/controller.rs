//! A Controller service as far as it makes sense: volumes are not made, they are Datasets that exist. For conformance
//! tests, and for those who want a StorageClass that names one Dataset.
//!
//! Nothing is stored. A volume's id says which Dataset it is, and is as lasting as that Dataset; creating it twice gives the
//! same id, and deleting it deletes nothing.

use std::collections::HashMap;

use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{
    calls::Calls,
    capability::Capability,
    error::VolumeError,
    proto::csi::{
        ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
        CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
        ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume, VolumeCapability,
        controller_server,
        controller_service_capability::{self, Rpc, rpc},
        validate_volume_capabilities_response::Confirmed,
    },
    source::{DATASET, Dataset, NAME, SERVICE},
};

/// Parameters that are a volume's context as well.
const PARAMETERS: [&str; 3] = [DATASET, NAME, SERVICE];

/// Gives Datasets as volumes.
pub struct Controller {
    /// The workers of calls.
    pub calls: Calls,
}

/// `UID-OF-THE-DATASET.HASH-OF-THE-NAME`: two claims for one Dataset are two volumes.
fn volume_id(dataset: Uuid, name: &str) -> String {
    format!("{dataset}.{}", Uuid::new_v5(&dataset, name.as_bytes()).simple())
}

fn exists(volume: &str) -> bool {
    let parts = volume.split_once('.');
    parts.is_some_and(|(dataset, name)| Uuid::try_parse(dataset).is_ok() && Uuid::try_parse(name).is_ok())
}

fn check_all(capabilities: &[VolumeCapability]) -> Result<(), VolumeError> {
    if capabilities.is_empty() {
        return Err(VolumeError::Invalid("volume capabilities are required".to_owned()));
    }
    capabilities.iter().try_for_each(|capability| Capability::check(Some(capability)).map(|_| ()))
}

fn create(request: CreateVolumeRequest) -> Result<CreateVolumeResponse, VolumeError> {
    let CreateVolumeRequest { name, capacity_range: _, volume_capabilities, parameters, volume_content_source } =
        request;
    if name.is_empty() {
        return Err(VolumeError::Invalid("a name is required".to_owned()));
    }
    check_all(&volume_capabilities)?;
    if volume_content_source.is_some() {
        return Err(VolumeError::Invalid("a volume cannot be made from another one".to_owned()));
    }
    if let Some(unknown) = parameters.keys().find(|name| !PARAMETERS.contains(&name.as_str())) {
        return Err(VolumeError::Invalid(format!("parameter '{unknown}' is unknown")));
    }
    let Dataset { id: Some(id), .. } = Dataset::check(&parameters)? else {
        return Err(VolumeError::Invalid(format!("parameter '{DATASET}' is required")));
    };
    // How large a Dataset is, is not known here: 0 says so.
    Ok(CreateVolumeResponse {
        volume: Some(Volume { capacity_bytes: 0, volume_id: volume_id(id, &name), volume_context: parameters }),
    })
}

fn delete(DeleteVolumeRequest { volume_id }: DeleteVolumeRequest) -> Result<DeleteVolumeResponse, VolumeError> {
    if volume_id.is_empty() {
        return Err(VolumeError::Invalid("a volume id is required".to_owned()));
    }
    Ok(DeleteVolumeResponse {})
}

fn validate(request: ValidateVolumeCapabilitiesRequest) -> Result<ValidateVolumeCapabilitiesResponse, VolumeError> {
    let ValidateVolumeCapabilitiesRequest { volume_id, volume_context, volume_capabilities, parameters } = request;
    if volume_id.is_empty() {
        return Err(VolumeError::Invalid("a volume id is required".to_owned()));
    }
    if volume_capabilities.is_empty() {
        return Err(VolumeError::Invalid("volume capabilities are required".to_owned()));
    }
    if !exists(&volume_id) {
        return Err(VolumeError::NotFound(format!("there is no volume '{volume_id}'")));
    }
    Ok(match check_all(&volume_capabilities).and_then(|()| check_context(&volume_context)) {
        Ok(()) => ValidateVolumeCapabilitiesResponse {
            confirmed: Some(Confirmed { volume_context, volume_capabilities, parameters }),
            message: String::new(),
        },
        Err(error) => ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.to_string() },
    })
}

/// It may be left out.
fn check_context(context: &HashMap<String, String>) -> Result<(), VolumeError> {
    if context.is_empty() { Ok(()) } else { Dataset::check(context).map(|_| ()) }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.name.clone();
        self.calls.observe("CreateVolume", &name, async { Ok(create(request)?) }).await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.calls.observe("DeleteVolume", &volume, async { Ok(delete(request)?) }).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.calls.observe("ValidateVolumeCapabilities", &volume, async { Ok(validate(request)?) }).await
    }

    async fn controller_get_capabilities(
        &self,
        _request: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| {
            let rpc = controller_service_capability::Type::Rpc(Rpc { r#type: kind.into() });
            ControllerServiceCapability { r#type: Some(rpc) }
        };
        let capabilities =
            vec![capability(rpc::Type::CreateDeleteVolume), capability(rpc::Type::SingleNodeMultiWriter)];
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

    const ID: &str = "7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11";

    fn request(name: &str) -> CreateVolumeRequest {
        let parameters = [(DATASET, ID), (NAME, "default/pictures"), (SERVICE, "a.b.svc:7400")];
        CreateVolumeRequest {
            name: name.to_owned(),
            volume_capabilities: vec![capability(AccessType::Mount(MountVolume::default()))],
            parameters: parameters.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            ..Default::default()
        }
    }

    fn capability(access_type: AccessType) -> VolumeCapability {
        VolumeCapability { access_type: Some(access_type), access_mode: Some(AccessMode { mode: 1 }) }
    }

    #[test]
    fn names_are_volumes_and_the_same_name_is_the_same_volume() {
        let id = |name| create(request(name)).unwrap().volume.unwrap().volume_id;
        assert_eq!(id("a"), id("a"));
        assert_ne!(id("a"), id("b"));
        assert!(id("a").len() <= 128 && exists(&id(&"x".repeat(128))));
        assert!(!exists("fake-vol-id") && !exists(ID));
        let context = create(request("a")).unwrap().volume.unwrap().volume_context;
        assert_eq!(context, request("a").parameters);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut with_more = request("a");
        with_more.parameters.insert("more".into(), "x".into());
        let block = vec![capability(AccessType::Block(BlockVolume {}))];
        for (request, named) in [
            (request(""), "name"),
            (CreateVolumeRequest { volume_capabilities: vec![], ..request("a") }, "capabilities"),
            (CreateVolumeRequest { volume_capabilities: block, ..request("a") }, "block"),
            (CreateVolumeRequest { parameters: HashMap::new(), ..request("a") }, "'dataset'"),
            (CreateVolumeRequest { volume_content_source: Some(Default::default()), ..request("a") }, "another"),
            (with_more, "'more'"),
        ] {
            let error = create(request).unwrap_err();
            assert!(matches!(error, VolumeError::Invalid(_)) && error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn capabilities_are_confirmed_or_the_reason_is_told() {
        let ask = |access_type| ValidateVolumeCapabilitiesRequest {
            volume_id: volume_id(Uuid::nil(), "a"),
            volume_context: request("a").parameters,
            volume_capabilities: vec![capability(access_type)],
            parameters: HashMap::new(),
        };
        let confirmed = validate(ask(AccessType::Mount(MountVolume::default()))).unwrap();
        assert_eq!(confirmed.confirmed.unwrap().volume_context, request("a").parameters);
        let refused = validate(ask(AccessType::Block(BlockVolume {}))).unwrap();
        assert!(refused.confirmed.is_none() && refused.message.contains("block"));
        let unknown = ValidateVolumeCapabilitiesRequest {
            volume_id: "unknown".into(),
            ..ask(AccessType::Mount(MountVolume::default()))
        };
        assert!(matches!(validate(unknown), Err(VolumeError::NotFound(_))));
    }
}
