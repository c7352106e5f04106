//! Real workers in this process, a real S3 server, the real client; all on 127.0.0.1.

mod control;
mod faults;
mod garbage;
mod harness;
mod reads;
mod restarts;
