//! `forebay-operator crds`: Helm installs CRDs once and never upgrades them, so this does both.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use tokio::time::{Instant, sleep};

use crate::{context::within, labels::MANAGER};

/// How long the API server may take to serve a kind.
const ESTABLISHED: Duration = Duration::from_secs(60);

/// Applies the CRDs and waits until they are served.
pub async fn run() -> anyhow::Result<ExitCode> {
    let client = Client::try_default().await.context("no way to the API server is known")?;
    let api: Api<CustomResourceDefinition> = Api::all(client);
    let params = PatchParams::apply(MANAGER).force();
    for crd in forebay_api::crds() {
        let name = crd.name_any();
        within(api.patch(&name, &params, &Patch::Apply(&crd))).await.with_context(|| format!("{name} was refused"))?;
        established(&api, &name).await?;
        println!("{name} is installed");
    }
    Ok(ExitCode::SUCCESS)
}

async fn established(api: &Api<CustomResourceDefinition>, name: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    while began.elapsed() < ESTABLISHED {
        let crd = within(api.get(name)).await.with_context(|| format!("{name} cannot be read"))?;
        let conditions = crd.status.and_then(|status| status.conditions).unwrap_or_default();
        if conditions.iter().any(|condition| condition.type_ == "Established" && condition.status == "True") {
            return Ok(());
        }
        sleep(Duration::from_millis(200)).await;
    }
    bail!("{name} is not served within {ESTABLISHED:?}")
}
