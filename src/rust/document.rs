//! Writes R/extendr-wrappers.R: prints the R wrappers of all functions that the crate exports.

#[expect(
    clippy::print_stdout,
    reason = "tools/document.sh writes it to that file"
)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let metadata = rustcluster::get_rustcluster_metadata();
    print!("{}", metadata.make_r_wrappers(true, "rustcluster")?);
    Ok(())
}
