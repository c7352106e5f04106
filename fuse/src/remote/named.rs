//! The dataset of a volume: known from the start, or looked for by its name until a worker knows it.

use std::time::Duration;

use forebay_client::{Client, DatasetClient};
use forebay_protocol::DatasetId;
use tokio::sync::watch;

use crate::{
    config::{DatasetRef, split_name},
    tree::TreeError,
};

/// The first pause between two questions, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

#[derive(Clone)]
pub(super) struct Named {
    name: String,
    deadline: Duration,
    found: watch::Receiver<Option<DatasetClient>>,
}

impl Named {
    /// Looks for it in a task of its own if only its name is known; `name` is `namespace/name`.
    pub(super) fn new(client: &Client, dataset: &DatasetRef, name: &str, deadline: Duration) -> Self {
        let known = match dataset {
            DatasetRef::Id(id) => Some(client.dataset(*id)),
            DatasetRef::ByName => None,
        };
        let looked_for = known.is_none();
        let (sender, found) = watch::channel(known);
        if looked_for {
            tokio::spawn(look_for(client.clone(), name.to_owned(), sender));
        }
        Self { name: name.to_owned(), deadline, found }
    }

    /// The dataset, if it is known.
    pub(super) fn get(&self) -> Option<DatasetClient> {
        self.found.borrow().clone()
    }

    /// Its id, if it is known.
    pub(super) fn id(&self) -> Option<DatasetId> {
        self.found.borrow().as_ref().map(DatasetClient::id)
    }

    /// The dataset, as soon as it is known.
    pub(super) async fn wait(&self) -> Result<DatasetClient, TreeError> {
        if let Some(known) = self.get() {
            return Ok(known);
        }
        let mut found = self.found.clone();
        let waiting = tokio::time::timeout(self.deadline, found.wait_for(Option::is_some));
        let known = waiting.await.ok().and_then(|known| known.ok()?.clone());
        known.ok_or_else(|| {
            TreeError::Unavailable(format!("no worker knew dataset {} within {:?}", self.name, self.deadline))
        })
    }
}

/// Ends when it is found, or nobody wants to know any more.
async fn look_for(client: Client, name: String, found: watch::Sender<Option<DatasetClient>>) {
    // The configuration is checked for it.
    let Some((namespace, short)) = split_name(&name) else { return };
    let mut pause = PAUSE.0;
    let looking = async {
        loop {
            if let Some(id) = client.find_dataset(namespace, short).await {
                tracing::info!(dataset = name, %id, "found by its name");
                return client.dataset(id);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    };
    tokio::select! {
        dataset = looking => {
            found.send_replace(Some(dataset));
        }
        () = found.closed() => {}
    }
}
