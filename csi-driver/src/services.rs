//! The services of the driver's socket.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use crate::{
    controller::Controller,
    identity::Identity,
    node::Node,
    proto::csi::{controller_server::ControllerServer, identity_server::IdentityServer, node_server::NodeServer},
};

/// All services; the path of a call begins with the name of its service.
#[derive(Clone)]
pub struct Services {
    /// Who this is.
    pub identity: IdentityServer<Identity>,
    /// The volumes of this node.
    pub node: NodeServer<Node>,
    /// Only when it is asked for.
    pub controller: Option<ControllerServer<Controller>>,
}

type HttpRequest = hyper::Request<Body>;
type HttpResponse = hyper::Response<Body>;

impl Service<HttpRequest> for Services {
    type Response = HttpResponse;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // All are always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest) -> Self::Future {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        match &mut self.controller {
            _ if service == IdentityServer::<Identity>::NAME => Box::pin(self.identity.call(request)),
            _ if service == NodeServer::<Node>::NAME => Box::pin(self.node.call(request)),
            Some(controller) if service == ControllerServer::<Controller>::NAME => Box::pin(controller.call(request)),
            _ => Box::pin(async { Ok(Status::unimplemented("no such service").into_http()) }),
        }
    }
}
