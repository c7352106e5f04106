//! The chunk store through its public interface, on real directories.

mod disk_full;
mod faults;
mod model;
mod stress;
mod support;
