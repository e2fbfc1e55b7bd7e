# A connection for future's own `plan(cluster, workers = cl)`, whose resolved() waits for the connection of a node with
# socketSelect(). Nodes of this package have no connection. Each cluster opens one when future first asks for it. The
# hub makes the connection readable while the next answer of the node that future asked for last has arrived. One
# connection for each cluster suffices, since future asks for the connection each time. R's table has room for 125.

# The `connection` of each cluster, by the cluster's id, and the `description` that identifies it. The connections are
# not in the handle, which is sent to workers along with functions.
readiness <- new.env(parent = emptyenv())

#' @export
`$.RustNode` <- function(x, name) elementOf(x, name, sys.function(sys.parent()))

#' @export
`[[.RustNode` <- function(x, i, ...) elementOf(x, i, sys.function(sys.parent()))

# Returns an element of a node. `asker`: the function that asks for it.
elementOf <- function(node, name, asker) {
  value <- .subset2(node, name)
  if (is.null(value) && identical(name, "con") && selects(asker)) connectionOf(node) else value
}

# Returns whether a function of future waits for connections. For its other functions, a connection means that the
# worker is a PSOCK worker, which can send conditions through it.
selects <- function(fun) {
  is.function(fun) && !is.primitive(fun) && environmentName(topenv(environment(fun))) == "future" &&
    "socketSelect" %in% all.names(body(fun))
}

# Returns the connection of a node's cluster, or NULL without one, for example if R's table is full. Future then waits
# for the value.
connectionOf <- function(node) {
  handle <- .subset2(node, "handle")
  # The connection of a stopped cluster is closed, which is an error in future.
  if (!handle$stopped) {
    if (!isOpenReadiness(handle) && !openReadiness(handle)) return(NULL)
    if (is.null(checked(hub_readiness_point(handle$pointer, .subset2(node, "rank")), handle))) return(NULL)
  }
  readiness[[handle$id]]$connection
}

# Returns whether the connection is open. closeAllConnections() may have closed it, and another one may have its number.
isOpenReadiness <- function(handle) {
  known <- readiness[[handle$id]]
  if (is.null(known)) return(FALSE)
  tryCatch(summary(known$connection)$description == known$description, error = function(e) FALSE)
}

openReadiness <- function(handle) {
  forgetReadiness(handle)
  listening <- hub_readiness_listen(handle$pointer)
  if (!is.integer(listening)) return(FALSE)
  reg.finalizer(handle, forgetReadiness)
  suspendInterrupts({
    connection <- tryCatch(
      suppressWarnings(socketConnection("127.0.0.1", listening[[1L]], open = "r+b", blocking = TRUE, timeout = 10)),
      error = function(e) NULL
    )
    if (is.null(connection)) return(FALSE)
    readiness[[handle$id]] <- list(connection = connection, description = summary(connection)$description)
  })
  writeBin(as.raw(listening[-1L]), connection)
  if (isTRUE(hub_readiness_accept(handle$pointer)) && isConnectionLeft()) return(TRUE)
  forgetReadiness(handle)
  FALSE
}

# Future opens connections of its own to capture output, and must not find the table full.
isConnectionLeft <- function() {
  connection <- tryCatch(textConnection("", local = TRUE), error = function(e) NULL)
  if (is.null(connection)) return(FALSE)
  close(connection)
  TRUE
}

closeReadiness <- function(handle) {
  if (isOpenReadiness(handle)) close(readiness[[handle$id]]$connection)
}

forgetReadiness <- function(handle) {
  closeReadiness(handle)
  if (!is.null(readiness[[handle$id]])) rm(list = handle$id, envir = readiness)
}
