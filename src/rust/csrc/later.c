/* Schedules R code in an event loop of the package 'later' from the hub's thread. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Rdynload.h>
#include <stdint.h>

typedef void (*later_function)(void (*)(void *), void *, double, int);

/* Returns the scheduling function of the package 'later' that any thread may call. R jumps if the package does not
 * export it. */
void *rustcluster_later(void)
{
    return (void *) R_GetCCallable("later", "execLaterNative2");
}

/* Calls callsWoken() with the number of a cluster. */
static void process_calls(void *data)
{
    SEXP name = PROTECT(Rf_mkString("rustcluster")), namespace = PROTECT(R_FindNamespace(name));
    SEXP number = PROTECT(Rf_ScalarReal((double) (uintptr_t) data));
    SEXP call = PROTECT(Rf_lang2(Rf_install("callsWoken"), number));

    Rf_eval(call, namespace);
    UNPROTECT(4);
}

/* The callback. later runs it on R's thread. R must not jump out of it, over the C++ frames of later. */
static void on_wake(void *data)
{
    R_ToplevelExec(process_calls, data);
}

/* Schedules callsWoken() for a cluster in the event loop `loop`. `later`: the result of rustcluster_later(). Any
 * thread may call this function. */
void rustcluster_wake(void *later, uintptr_t number, int loop)
{
    ((later_function) later)(on_wake, (void *) number, 0, loop);
}
