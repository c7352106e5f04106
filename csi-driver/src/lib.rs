//! `forebay-csi`: the node plugin. It mounts Datasets for the pods of a node by the Container Storage Interface, and is the
//! keeper of those mounts: unprivileged FUSE daemons, in pods of their own, connect to it and serve them.
//!
//! - [`node`], [`identity`], [`controller`]: the [`services`] of CSI 1.13; they check requests ([`capability`], [`source`]);
//! - [`calls`]: how requests become work, with [`locks`] and deadlines;
//! - [`volumes`]: the life of a volume, over [`stages`] (the keeper's mounts) and [`binds`] (the pods' mounts);
//! - [`health`], [`stats`]: how volumes are, and how large;
//! - [`registration`]: the kubelet learns of this driver; [`http`], [`metrics`]: probes and numbers;
//! - [`driver`]: all of it as a process.
//!
//! Invariants:
//! - nothing that can hang runs on a gRPC thread, and everything that can hang has a deadline ([`bounded`]);
//! - what is mounted is found out from the mount table and the keeper, never by a stat of a mount;
//! - keys are shown by no log, error or `Debug`;
//! - ending this process unmounts nothing.

pub mod args;
pub mod authority;
pub mod binds;
pub mod bounded;
pub mod calls;
pub mod capability;
pub mod controller;
pub mod driver;
pub mod error;
pub mod health;
pub mod http;
pub mod identity;
pub mod locks;
pub mod metrics;
pub mod node;
pub mod proto;
pub mod registration;
pub mod services;
pub mod socket;
pub mod source;
pub mod stages;
pub mod stats;
pub mod volumes;
