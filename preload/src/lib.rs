//! Runs of a PreloadPolicy.
//!
//! | module | does |
//! |---|---|
//! | [`due`] | what was asked for, what was done, and what time it is, to the run that is to start |
//! | [`asked`] | what a policy asks of a run, as workers are told |
//! | [`run`] | has every worker load its share, until all of them have |
//! | [`progress`] | how far that is, for the status |
//!
//! Invariants: a run is complete when every worker of one worker table has loaded its share of what is selected, by the
//! table of the same epoch; anything else is an error that says why. Whoever drives a run keeps nothing: the workers know
//! how far it is, under its name, and another driver joins it.

pub mod asked;
pub mod due;
pub mod progress;
pub mod run;
