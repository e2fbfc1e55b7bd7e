# What comes back from Rust. A function there never jumps and never throws: what it has to say
# besides its result is a value of another type.
#   character: a failure, to be raised as a condition.
#   pairlist:  R jumped (an error, an interrupt) while Rust had called it; the jump goes on here,
#              where no frame of Rust's is left to be skipped.

unwound <- function(result) {
  .Call("rustcluster_continue_unwind", result, PACKAGE = "rustcluster")
}

# For functions whose result is neither a character vector nor a pairlist.
checked <- function(result, handle = NULL) {
  switch(typeof(result),
    character = raiseFailure(result, handle),
    pairlist = unwound(result),
    result
  )
}
