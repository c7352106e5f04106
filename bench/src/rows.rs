//! The rows, in groups that share a data set.

mod at_once;
mod budget;
mod cold;
mod hints;
mod index;
mod large;
mod million;
mod preload;
mod shape;
mod small;
mod stalled;
mod transport;
mod walk;

use crate::{
    Bench,
    report::{Claim, Report},
};

/// Rows that share a data set.
#[derive(Clone, Copy, Debug)]
pub enum Group {
    /// One large file, warm.
    Large,
    /// Many small files.
    Small,
    /// Names and attributes.
    Walk,
    /// A million files in a store.
    Million,
    /// The files of a known benchmark.
    Shape,
    /// From a store that is far away.
    Cold,
    /// The same, in an order that the mount is told.
    Hints,
    /// Loaded before it is read.
    Preload,
    /// What a source gets from several workers.
    Budget,
    /// From a worker to a client.
    Transport,
    /// What a worker keeps of each file.
    Index,
    /// Many reads at the same time.
    AtOnce,
    /// While a source stalls.
    Stalled,
}

impl Group {
    /// In the order in which they are measured.
    pub const ALL: [Self; 13] = [
        Self::Large,
        Self::Small,
        Self::Walk,
        Self::Million,
        Self::Shape,
        Self::Cold,
        Self::Hints,
        Self::Preload,
        Self::Budget,
        Self::Transport,
        Self::Index,
        Self::AtOnce,
        Self::Stalled,
    ];

    /// What is claimed of it.
    pub fn claims(self) -> &'static [Claim] {
        match self {
            Self::Large => &large::CLAIMS,
            Self::Small => &small::CLAIMS,
            Self::Walk => &walk::CLAIMS,
            Self::Million => &million::CLAIMS,
            Self::Shape => &shape::CLAIMS,
            Self::Cold => &cold::CLAIMS,
            Self::Hints => &hints::CLAIMS,
            Self::Preload => &preload::CLAIMS,
            Self::Budget => &budget::CLAIMS,
            Self::Transport => &transport::CLAIMS,
            Self::Index => &index::CLAIMS,
            Self::AtOnce => &at_once::CLAIMS,
            Self::Stalled => &stalled::CLAIMS,
        }
    }

    /// Measures those of its rows that are wanted.
    pub async fn run(self, bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
        match self {
            Self::Large => large::run(bench, report).await,
            Self::Small => small::run(bench, report).await,
            Self::Walk => walk::run(bench, report).await,
            Self::Million => million::run(bench, report).await,
            Self::Shape => shape::run(bench, report).await,
            Self::Cold => cold::run(bench, report).await,
            Self::Hints => hints::run(bench, report).await,
            Self::Preload => preload::run(bench, report).await,
            Self::Budget => budget::run(bench, report).await,
            Self::Transport => transport::run(bench, report).await,
            Self::Index => index::run(bench, report).await,
            Self::AtOnce => at_once::run(bench, report).await,
            Self::Stalled => stalled::run(bench, report).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_claims_have_one_name() {
        let claims: Vec<_> = Group::ALL.iter().flat_map(|group| group.claims()).collect();
        let names: HashSet<_> = claims.iter().map(|claim| (claim.row, claim.phase)).collect();
        assert_eq!(names.len(), claims.len());
    }
}
