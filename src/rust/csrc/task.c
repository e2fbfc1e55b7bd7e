/* Runs a task on a worker: what parallel's workCommand() does between recvData() and sendData(). This is C code
 * because R may jump out of all of it, which Rust frames do not allow. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <math.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* Elements of `objects`, a preserved list: the current task, and objects that are made once. */
enum { TASK_FUN, TASK_ARGS, TASK_TAG, QUOTE, CALLER, OBJECTS };
static SEXP objects = NULL;

static void store(int what, SEXP value)
{
    SET_VECTOR_ELT(objects, what, value);
}

static void make_objects(void)
{
    if (objects)
        return;
    SEXP list = PROTECT(Rf_allocVector(VECSXP, OBJECTS));
    /* The symbol quote or the call base::quote, whichever the do.call() of this R version uses. */
    SEXP enquote = PROTECT(Rf_lang2(Rf_install("enquote"), R_NilValue));
    SET_VECTOR_ELT(list, QUOTE, CAR(Rf_eval(enquote, R_BaseEnv)));
    SEXP name = PROTECT(Rf_mkString("parallel"));
    SET_VECTOR_ELT(list, CALLER, R_FindNamespace(name));
    R_PreserveObject(list);
    objects = list;
    UNPROTECT(3);
}

/* Returns an element of a list by its name, or R_NilValue. */
static SEXP field(SEXP list, const char *name)
{
    SEXP names = TYPEOF(list) == VECSXP ? Rf_getAttrib(list, R_NamesSymbol) : R_NilValue;

    if (TYPEOF(names) == STRSXP)
        for (R_xlen_t i = 0; i < Rf_xlength(list); i++)
            if (!strcmp(CHAR(STRING_ELT(names, i)), name))
                return VECTOR_ELT(list, i);
    return R_NilValue;
}

/* Returns a call of quote() with a value. It is not protected. */
static SEXP quoted(SEXP value)
{
    return Rf_lang2(VECTOR_ELT(objects, QUOTE), value);
}

/* Returns the call that do.call(fun, args, quote = TRUE) evaluates. If `fun` is not a function or `args` is not a
 * list, returns a call of do.call() itself, which handles them. The result is not protected. */
static SEXP call_of(SEXP fun, SEXP args)
{
    if (!Rf_isFunction(fun) || TYPEOF(args) != VECSXP) {
        SEXP rest = PROTECT(Rf_list3(R_NilValue, R_NilValue, R_NilValue));
        SETCAR(rest, quoted(fun));
        SETCADR(rest, quoted(args));
        SETCADDR(rest, Rf_ScalarLogical(TRUE));
        SET_TAG(CDDR(rest), R_QuoteSymbol);
        SEXP call = Rf_lcons(Rf_install("do.call"), rest);
        UNPROTECT(1);
        return call;
    }
    R_xlen_t n = Rf_xlength(args);
    SEXP names = Rf_getAttrib(args, R_NamesSymbol);
    SEXP rest = PROTECT(Rf_allocList((int) n)), at = rest;
    for (R_xlen_t i = 0; i < n; i++, at = CDR(at)) {
        SETCAR(at, quoted(VECTOR_ELT(args, i)));
        if (TYPEOF(names) == STRSXP && LENGTH(STRING_ELT(names, i)))
            SET_TAG(at, Rf_installTrChar(STRING_ELT(names, i)));
    }
    SEXP call = Rf_lcons(fun, rest);
    UNPROTECT(1);
    return call;
}

/* Stores the elements of proc.time(), in seconds: user, system and elapsed time, and user and system time of child
 * processes. Like proc.time(), truncates CPU times to milliseconds and rounds the elapsed time. */
static void proc_time(double time[5])
{
    static time_t start = 0;
    struct rusage self, children;
    struct timespec clock;

    clock_gettime(CLOCK_MONOTONIC, &clock);
    getrusage(RUSAGE_SELF, &self);
    getrusage(RUSAGE_CHILDREN, &children);
    if (!start)
        start = clock.tv_sec;
    time[0] = self.ru_utime.tv_sec + 1e-3 * (self.ru_utime.tv_usec / 1000);
    time[1] = self.ru_stime.tv_sec + 1e-3 * (self.ru_stime.tv_usec / 1000);
    time[2] = (clock.tv_sec - start) + 1e-3 * rint(1e-6 * clock.tv_nsec);
    time[3] = children.ru_utime.tv_sec + 1e-3 * (children.ru_utime.tv_usec / 1000);
    time[4] = children.ru_stime.tv_sec + 1e-3 * (children.ru_stime.tv_usec / 1000);
}

static double start_time[5];
static int is_timed = 0;

/* Stores the task of one of parallel's messages. Returns 0 if the message ends the worker (type "DONE"), otherwise 1.
 * R may jump. */
int rustcluster_take_message(void *message)
{
    SEXP type = field((SEXP) message, "type"), data = field((SEXP) message, "data");

    make_objects();
    is_timed = 0;
    if (TYPEOF(type) != STRSXP || LENGTH(type) != 1)
        Rf_error("a message without a type");
    if (!strcmp(CHAR(STRING_ELT(type, 0)), "DONE"))
        return 0;
    store(TASK_FUN, field(data, "fun"));
    store(TASK_ARGS, field(data, "args"));
    store(TASK_TAG, field(data, "tag"));
    return 1;
}

/* Stores a task whose function, arguments and tag are separate objects. R may jump. */
void rustcluster_take_call(void *fun, void *args, void *tag)
{
    make_objects();
    is_timed = 0;
    store(TASK_FUN, (SEXP) fun);
    store(TASK_ARGS, (SEXP) args);
    store(TASK_TAG, (SEXP) tag);
}

/* Returns the names of a list, or NULL. */
static SEXP names_of(SEXP list)
{
    SEXP names = Rf_getAttrib(list, R_NamesSymbol);

    return TYPEOF(names) == STRSXP ? names : NULL;
}

/* Returns the arguments of a task of a job. `common`: a list of the function and of the list of arguments that all
 * tasks of the job have. `element`: the first argument of this task, or, if `spread`, a list of its first arguments.
 * The result is not protected. R may jump. */
SEXP rustcluster_arguments(void *common, void *element, int spread)
{
    SEXP rest = VECTOR_ELT((SEXP) common, 1);
    R_xlen_t first = spread ? Rf_xlength((SEXP) element) : 1, more = Rf_xlength(rest);
    SEXP args = PROTECT(Rf_allocVector(VECSXP, first + more));
    SEXP of_first = spread ? names_of((SEXP) element) : NULL, of_more = names_of(rest);

    for (R_xlen_t i = 0; i < first; i++)
        SET_VECTOR_ELT(args, i, spread ? VECTOR_ELT((SEXP) element, i) : (SEXP) element);
    for (R_xlen_t i = 0; i < more; i++)
        SET_VECTOR_ELT(args, first + i, VECTOR_ELT(rest, i));
    if (of_first || of_more) {
        SEXP names = PROTECT(Rf_allocVector(STRSXP, first + more));
        for (R_xlen_t i = 0; of_first && i < first; i++)
            SET_STRING_ELT(names, i, STRING_ELT(of_first, i));
        for (R_xlen_t i = 0; of_more && i < more; i++)
            SET_STRING_ELT(names, first + i, STRING_ELT(of_more, i));
        Rf_setAttrib(args, R_NamesSymbol, names);
        UNPROTECT(1);
    }
    UNPROTECT(1);
    return args;
}

/* Stores a task of a job. The parameters are those of rustcluster_arguments(). R may jump. */
void rustcluster_take_element(void *common, void *element, int spread)
{
    make_objects();
    is_timed = 0;
    SEXP args = rustcluster_arguments(common, element, spread);
    store(TASK_ARGS, args);
    store(TASK_FUN, VECTOR_ELT((SEXP) common, 0));
    store(TASK_TAG, R_NilValue);
}

/* Runs the stored task and returns its value, which is not protected. `with_time`: whether to measure its time, for
 * rustcluster_end_task(). R may jump. */
SEXP rustcluster_run_task(int with_time)
{
    SEXP call = PROTECT(call_of(VECTOR_ELT(objects, TASK_FUN), VECTOR_ELT(objects, TASK_ARGS)));
    /* The caller of the task, in place of the frame of workCommand(). Each task has a new one, so that its
     * assignments in the caller's frame do not outlive it. */
    SEXP caller = PROTECT(R_NewEnv(VECTOR_ELT(objects, CALLER), FALSE, 0));

    if (with_time) {
        proc_time(start_time);
        is_timed = 1;
    }
    SEXP value = Rf_eval(call, caller);
    UNPROTECT(2);
    return value;
}

/* Ends the stored task and releases its objects. Stores its times in `time`, in the order of proc.time(), or zeros if
 * they were not measured. Returns its tag, which is not protected. R may jump. */
SEXP rustcluster_end_task(double time[5])
{
    make_objects();
    proc_time(time);
    for (int i = 0; i < 5; i++)
        time[i] = is_timed ? time[i] - start_time[i] : 0;
    SEXP tag = VECTOR_ELT(objects, TASK_TAG);
    is_timed = 0;
    store(TASK_FUN, R_NilValue);
    store(TASK_ARGS, R_NilValue);
    store(TASK_TAG, R_NilValue);
    return tag;
}
