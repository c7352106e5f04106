//! CSI's Identity service.

use tonic::{Request, Response, Status};

use crate::{
    calls::Calls,
    proto::csi::{
        GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
        PluginCapability, ProbeRequest, ProbeResponse, identity_server,
        plugin_capability::{self, Service, service},
    },
};

/// The driver's name.
pub const NAME: &str = "csi.forebay.io";

/// Answers who this is.
pub struct Identity {
    /// The workers of calls.
    pub calls: Calls,
    /// Whether the Controller service is there.
    pub controller: bool,
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(GetPluginInfoResponse { name: NAME.to_owned(), vendor_version: version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let controller = Service { r#type: service::Type::ControllerService.into() };
        let controller = PluginCapability { r#type: Some(plugin_capability::Type::Service(controller)) };
        let capabilities = self.controller.then_some(controller).into_iter().collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let answers = self.calls.look(|volumes| volumes.stages().status());
        let answers = async { answers.await.map(|_| ProbeResponse { ready: Some(true) }) };
        self.calls.observe("Probe", "", answers).await
    }
}
