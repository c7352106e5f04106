//! Runs tests: those that disturb nobody, side by side, then the others one after the other.

use std::{
    cell::RefCell,
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use crate::{Company, Env, Outcome, Test};

/// Tests at a time. They mostly wait for pods.
const SIDE_BY_SIDE: usize = 3;

thread_local! {
    /// What the test of this thread has said, where it is to be printed as a whole.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Prints lines that belong to the running test.
pub fn say_line(line: fmt::Arguments<'_>) {
    SAID.with_borrow_mut(|said| match said {
        Some(said) => *said += &format!("{line}\n"),
        None => println!("{line}"),
    });
}

/// Prints what a test has seen, below its name.
macro_rules! say {
    ($($format:tt)+) => {
        crate::runner::say_line(format_args!("        {}", format_args!($($format)+)))
    };
}
pub(crate) use say;

/// The tests that failed.
pub fn run(env: &Env, tests: &[&'static Test]) -> Vec<&'static str> {
    let (many, alone): (Vec<&Test>, Vec<&Test>) = tests.iter().partition(|test| test.company == Company::SideBySide);
    let (next, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let heading = |test: &Test| {
        let number = ended.fetch_add(1, Ordering::Relaxed) + 1;
        println!("[{number}/{}] {}", tests.len(), test.name);
    };
    let side = || {
        let mut failed = Vec::new();
        while let Some(test) = many.get(next.fetch_add(1, Ordering::Relaxed)) {
            SAID.set(Some(String::new()));
            let passed = run_one(env, test);
            let said = SAID.take().unwrap_or_default();
            let _one_at_a_time = std::io::stdout().lock();
            heading(test);
            print!("{said}");
            failed.extend((!passed).then_some(test.name));
        }
        failed
    };
    let mut failed: Vec<&str> = thread::scope(|scope| {
        let sides: Vec<_> = (0..SIDE_BY_SIDE).map(|_| scope.spawn(side)).collect();
        sides.into_iter().flat_map(|side| side.join().unwrap_or_else(|_| vec!["a test that panicked"])).collect()
    });
    for test in alone {
        heading(test);
        if !run_one(env, test) {
            failed.push(test.name);
        }
    }
    failed
}

/// Whether it did not fail.
fn run_one(env: &Env, test: &Test) -> bool {
    let begin = Instant::now();
    let namespace = format!("e2e-{}", test.name.replace('_', "-").chars().take(40).collect::<String>());
    let result = env.in_namespace(namespace.trim_end_matches('-'), test.run);
    let took = begin.elapsed().as_secs_f32();
    match &result {
        Ok(Outcome::Passed) => say!("passed in {took:.1} s"),
        Ok(Outcome::Skipped(why)) => say!("SKIPPED: {why}"),
        Err(error) => say!("FAILED after {took:.1} s: {error:#}"),
    }
    result.is_ok()
}
