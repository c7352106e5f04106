//! `forebay-operator guard`: nobody takes away the operator while there is something that only it can undo.

use std::process::ExitCode;

use anyhow::Context as _;
use forebay_api::{CacheRuntime, Dataset};
use kube::{Api, Client, Resource, ResourceExt as _, api::ListParams, core::PartialObjectMeta};

use crate::context::within;

/// Most objects that are named.
const NAMED: u32 = 50;

/// Fails, and names them, while there are Datasets or CacheRuntimes.
pub async fn run() -> anyhow::Result<ExitCode> {
    let client = Client::try_default().await.context("no way to the API server is known")?;
    let mut left = names::<Dataset>(&client).await?;
    left.extend(names::<CacheRuntime>(&client).await?);
    if left.is_empty() {
        println!("there are no Datasets and no CacheRuntimes");
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "Forebay is in use. Without its operator nobody unmounts and removes these, so delete them first:\n  {}",
        left.join("\n  ")
    );
    Ok(ExitCode::FAILURE)
}

/// Objects of a kind; none if the kind is not installed.
async fn names<K>(client: &Client) -> anyhow::Result<Vec<String>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let api: Api<PartialObjectMeta<K>> = Api::all(client.clone());
    let kind = K::kind(&());
    let list = match within(api.list(&ListParams::default().limit(NAMED))).await {
        Ok(list) => list,
        Err(error) if error.is(404) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{kind} objects could not be listed")),
    };
    let mut names: Vec<String> = list
        .items
        .iter()
        .map(|object| format!("{kind} {}/{}", object.namespace().unwrap_or_default(), object.name_any()))
        .collect();
    let more = list.metadata.remaining_item_count.unwrap_or_default();
    if more > 0 {
        names.push(format!("and {more} more of kind {kind}"));
    }
    Ok(names)
}
