//! What people ask of a running instance.

mod browse;
mod status;
mod top;
mod transfer;
mod validate;

pub use browse::{LsArgs, StatArgs, ls, stat};
pub use status::{StatusArgs, status};
pub use top::{TopArgs, top};
pub use transfer::{LoadArgs, PathArgs, PinArgs, SelectionArgs, TermsArgs, free, load, pin, refresh};
pub use validate::{ValidateArgs, validate};
