# Package BiocParallel: as(cl, "SnowParam") of a cluster of this package, as of a PSOCK cluster.
#
# BiocParallel sends tasks through parallel's sendData(), and receives their results through recvOneData(). The classes
# and methods here are defined when BiocParallel is loaded, in an environment of their own.

registerBiocParallelMethods <- function(...) {
  namespace <- asNamespace("BiocParallel")
  if (!methods::existsMethod("coerce", methods::signature("SOCKcluster", "SnowParam"))) return(invisible())
  where <- new.env(parent = namespace)
  assign(".packageName", "rustcluster", where)
  methods::setOldClass(c("RustCluster", "cluster"), where = where)
  methods::setAs("RustCluster", "SnowParam", asSnowParam, where = where)
  methods <- list(.send_to = sendToWorker, .recv_any = receiveFromWorkers)
  for (generic in names(methods)) {
    known <- get0(generic, namespace, mode = "function", inherits = FALSE)
    if (!methods::is(known, "standardGeneric")) next
    # A version with other arguments keeps its own method.
    if (!identical(names(formals(known)), names(formals(methods[[generic]])))) next
    methods::setMethod(generic, "RustCluster", methods[[generic]], where = where)
  }
  invisible()
}

# BiocParallel's own method makes the object, from a cluster of a class that it knows.
asSnowParam <- function(from) {
  param <- methods::as(structure(unclass(from), class = c("SOCKcluster", "cluster")), "SnowParam")
  param$cluster <- from
  param$.clusterargs$type <- "RUST"
  param
}

# Sends a task, and notes how many elements it has.
sendToWorker <- function(backend, node, value) {
  node <- backend[[node]]
  handle <- .subset2(node, "handle")
  handle$elements[[as.character(.subset2(node, "rank"))]] <- length(value$data$args$X)
  sendData.RustNode(node, value)
  TRUE
}

# Returns the next result. The value of a task of BiocParallel is a list with the values and errors of its elements. A
# task that has failed as a whole (its worker has died, or cannot load BiocParallel) has a text instead, which
# BiocParallel would take for a value: each element gets an error that BiocParallel knows. Errors of the cluster are
# raised as they are.
receiveFromWorkers <- function(backend) {
  answer <- recvOneData.RustCluster(backend)
  value <- answer$value$value
  if (isFALSE(answer$value$success) && inherits(value, "try-error")) {
    node <- backend[[answer$node]]
    count <- .subset2(node, "handle")$elements[[as.character(.subset2(node, "rank"))]]
    answer$value$value <- rep(list(elementError(value)), max(1L, count))
  }
  answer
}

elementError <- function(value) {
  condition <- attr(value, "condition")
  if (!inherits(condition, "rustcluster_error")) {
    condition <- structure(class = c("error", "condition"), list(message = as.vector(unclass(value)), call = NULL))
  }
  own <- setdiff(class(condition), c("error", "condition"))
  class(condition) <- c(own, "worker_comm_error", "bperror", "error", "condition")
  condition
}

# Returns the number of the frame of BiocParallel's loop that sends from the frame with this number, or NULL. Between
# both are the frames of BiocParallel's generics and their methods.
biocParallelLoop <- function(frames) {
  if (!isNamespaceLoaded("BiocParallel")) return(NULL)
  loop <- asNamespace("BiocParallel")[[".bploop_impl"]]
  if (is.null(loop)) return(NULL)
  for (depth in seq(frames - 1L, max(1L, frames - 8L))) if (identical(sys.function(depth), loop)) return(depth)
}
