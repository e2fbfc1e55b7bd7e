# Package future asks whether a task of its own `plan(cluster, workers = cl)` has ended by waiting for the node's
# connection with socketSelect(). Nodes of ours have none, so each cluster opens one when it is first asked for it:
# the hub makes that readable while the next answer of the node which was asked last is there. One for each cluster
# is enough, since future asks for the connection each time, and R's table has room for 125.

# By the cluster's name here: `connection`, and the `description` by which it is known again. Not in the handle, which
# is sent to workers along with functions.
readiness <- new.env(parent = emptyenv())

#' @export
`$.RustNode` <- function(x, name) elementOf(x, name, sys.function(sys.parent()))

#' @export
`[[.RustNode` <- function(x, i, ...) elementOf(x, i, sys.function(sys.parent()))

# `asker`: the function that asks.
elementOf <- function(node, name, asker) {
  value <- .subset2(node, name)
  if (is.null(value) && identical(name, "con") && selects(asker)) connectionOf(node) else value
}

# Whether a function of future's waits for connections. Others of its functions take a connection for a sign that
# the worker is one of PSOCK's, which can send conditions by it.
selects <- function(fun) {
  is.function(fun) && !is.primitive(fun) && environmentName(topenv(environment(fun))) == "future" &&
    "socketSelect" %in% all.names(body(fun))
}

# NULL if there can be none, as when R's table is full. Future then waits for the value.
connectionOf <- function(node) {
  handle <- .subset2(node, "handle")
  # That of a stopped cluster is closed, which future calls an error.
  if (!handle$stopped) {
    if (!isOpenReadiness(handle) && !openReadiness(handle)) return(NULL)
    if (!checked(hub_readiness_point(handle$pointer, .subset2(node, "rank")), handle)) return(NULL)
  }
  readiness[[handle$id]]$connection
}

# closeAllConnections() may have closed it, and another may have its number.
isOpenReadiness <- function(handle) {
  known <- readiness[[handle$id]]
  if (is.null(known)) return(FALSE)
  tryCatch(summary(known$connection)$description == known$description, error = function(e) FALSE)
}

openReadiness <- function(handle) {
  forgetReadiness(handle)
  listening <- hub_readiness_listen(handle$pointer)
  if (!is.integer(listening)) return(FALSE)
  connection <- tryCatch(
    suppressWarnings(socketConnection("127.0.0.1", listening[[1L]], open = "r+b", blocking = TRUE, timeout = 10)),
    error = function(e) NULL
  )
  if (is.null(connection)) return(FALSE)
  description <- summary(connection)$description
  readiness[[handle$id]] <- list(connection = connection, description = description)
  reg.finalizer(handle, forgetReadiness)
  writeBin(as.raw(listening[-1L]), connection)
  isTRUE(hub_readiness_accept(handle$pointer))
}

closeReadiness <- function(handle) {
  if (isOpenReadiness(handle)) close(readiness[[handle$id]]$connection)
}

forgetReadiness <- function(handle) {
  closeReadiness(handle)
  if (!is.null(readiness[[handle$id]])) rm(list = handle$id, envir = readiness)
}
