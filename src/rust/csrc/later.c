/* Waking R's event loop, as package 'later' has it, from the hub's thread. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Rdynload.h>
#include <stdint.h>

typedef void (*later_function)(void (*)(void *), void *, double, int);

/* The function of later's that any thread may call. R jumps if later has none. */
void *rustcluster_later(void)
{
    return (void *) R_GetCCallable("later", "execLaterNative2");
}

static void look(void *data)
{
    SEXP name = PROTECT(Rf_mkString("rustcluster")), namespace = PROTECT(R_FindNamespace(name));
    SEXP number = PROTECT(Rf_ScalarReal((double) (uintptr_t) data));
    SEXP call = PROTECT(Rf_lang2(Rf_install("callsWoken"), number));

    Rf_eval(call, namespace);
    UNPROTECT(4);
}

/* Called by later, on R's thread, through code that R must not jump over. */
static void woken(void *data)
{
    R_ToplevelExec(look, data);
}

/* Has R look at the calls of the cluster of this number, from this loop of later's. From any thread. */
void rustcluster_wake(void *later, uintptr_t number, int loop)
{
    ((later_function) later)(woken, (void *) number, 0, loop);
}
