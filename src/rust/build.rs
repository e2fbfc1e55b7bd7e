//! Compiles the C helpers that catch R's jumps and run tasks. They are here and not among the
//! package's own C files because the `document` program, which has no part of those, links to them
//! too.

use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=R_INCLUDE_DIR");
    cc::Build::new()
        .files(
            [
                "answer", "later", "mapped", "seed", "task", "unwind", "value",
            ]
            .map(|name| format!("csrc/{name}.c")),
        )
        .include(include_dir()?)
        .compile("rustcluster_c");
    Ok(())
}

/// Where R's headers are: as the Makevars say, or as R itself does.
fn include_dir() -> Result<PathBuf, String> {
    if let Some(dir) = std::env::var_os("R_INCLUDE_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let home = std::env::var_os("R_HOME");
    let r = home.map_or("R".into(), |home| PathBuf::from(home).join("bin").join("R"));
    let output = Command::new(r)
        .args(["--no-echo", "--no-restore", "-e", "cat(R.home('include'))"])
        .output()
        .map_err(|error| format!("R is needed to build this package and was not found: {error}"))?;
    let dir = String::from_utf8_lossy(&output.stdout);
    Ok(PathBuf::from(dir.trim()))
}
