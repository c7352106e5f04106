//! A valid Dataset to the objects that it consists of. Pure; one file a kind.

mod claim;
mod volume;

pub use self::{claim::build as claim, volume::build as volume};
