//! The log, as a process of its own: its settings are those of the whole process.

use rustcluster_core::platform::log::{self, DIRECTIVES, DIRECTORY, Role};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use tracing::level_filters::LevelFilter;
use tracing::{debug, error, info};

fn set(directives: &str, directory: &Path) {
    // SAFETY: the only test of this program, so no other thread reads the environment.
    unsafe {
        std::env::set_var(DIRECTIVES, directives);
        std::env::set_var(DIRECTORY, directory);
    }
}

#[test]
fn events_go_to_a_file_of_the_process_as_the_environment_says() {
    let top = std::env::temp_dir().join(format!("rustcluster-log-test-{}", std::process::id()));
    let first = top.join("first");
    set("", &first);
    log::start(Role::Head).unwrap();
    error!("before");
    assert!(log::path().is_none() && !top.exists());

    set("log=info", &first);
    assert_eq!(log::start(Role::Head).unwrap_err().variable, DIRECTIVES);
    assert!(log::path().is_none() && !top.exists());

    for relative in ["logs", "~/logs"] {
        set("debug", Path::new(relative));
        let problem = log::start(Role::Head).unwrap_err();
        assert_eq!(problem.variable, DIRECTORY);
        assert!(problem.reason.contains("absolute"), "{}", problem.reason);
    }
    assert!(log::path().is_none() && !Path::new("~").exists());
    assert_eq!(LevelFilter::current(), LevelFilter::OFF);

    set("error,rustcluster::head=debug", &first);
    log::start(Role::Head).unwrap();
    assert_eq!(LevelFilter::current(), LevelFilter::DEBUG);
    let path = log::path().unwrap();
    debug!(target: "rustcluster_core::head", task = 5, rank = 3, "task submitted");
    info!(target: "rustcluster_core::agent", "not wanted");
    let reason = "two\nlines";
    error!(target: "rustcluster::agent", reason, text = %reason, "failed");
    let text = fs::read_to_string(path).unwrap();
    assert_eq!(
        fs::metadata(path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].ends_with(" rustcluster::head: task submitted task=5 rank=3"),
        "{text}"
    );
    assert!(
        lines[1].ends_with(" rustcluster::agent: failed reason=\"two\\nlines\" text=two\\nlines"),
        "{text}"
    );

    // Another role, as after a fork: another file, and the first one is left alone.
    let second = top.join("second");
    set("debug", &second);
    log::start(Role::Worker(6)).unwrap();
    debug!("of the worker");
    let worker = log::path().unwrap();
    assert!(worker.starts_with(&second));
    assert!(worker.to_string_lossy().contains("-worker7-"));
    let written = fs::read_to_string(worker).unwrap();
    assert!(written.contains("log begins") && written.contains("of the worker"));
    assert_eq!(fs::read_to_string(path).unwrap(), text);

    // A file that was removed is made again for the next cluster.
    fs::remove_dir_all(&second).unwrap();
    log::start(Role::Worker(6)).unwrap();
    debug!("of the next cluster");
    let written = fs::read_to_string(worker).unwrap();
    assert!(written.contains("of the next cluster"));

    // What is not a plain file of this user's is refused, and the log goes on as before.
    let name = worker.file_name().unwrap();
    let third = top.join("third");
    fs::create_dir(&third).unwrap();
    symlink(path, third.join(name)).unwrap();
    set("debug", &third);
    let problem = log::start(Role::Worker(6)).unwrap_err();
    assert_eq!(problem.variable, DIRECTORY);
    assert_eq!(log::path(), Some(worker));
    assert_eq!(fs::read_to_string(path).unwrap(), text);

    // Off again costs as little as never on.
    set("", &second);
    log::start(Role::Worker(6)).unwrap();
    error!("after");
    assert!(log::path().is_none());
    assert_eq!(LevelFilter::current(), LevelFilter::OFF);

    // A process that goes on without a file of its own, as a forked worker, does not write to the one before.
    set("debug", &second);
    log::start(Role::Agent).unwrap();
    let agent = log::path().unwrap();
    set("debug", path);
    log::start_or_say(Role::Worker(6));
    error!("after");
    assert!(log::path().is_none());
    for file in [path, worker, agent] {
        assert!(!fs::read_to_string(file).unwrap().contains("after"));
    }
    fs::remove_dir_all(top).unwrap();
}
