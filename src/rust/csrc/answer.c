/* Messages to and from tasks in the form that parallel uses. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>

SEXP rustcluster_arguments(void *common, void *element, int spread);

/* Elements of `constants`, a preserved list of vectors that all answers share. */
enum { TYPE, NAMES, TIME_NAMES, TIME_CLASS, INDEXED_NAMES, CONSTANTS };
static SEXP constants = NULL;

/* Returns a character vector, which is not protected. R copies it before it is modified. */
static SEXP strings(int n, const char *const *values)
{
    SEXP all = PROTECT(Rf_allocVector(STRSXP, n));

    for (int i = 0; i < n; i++)
        SET_STRING_ELT(all, i, Rf_mkChar(values[i]));
    MARK_NOT_MUTABLE(all);
    UNPROTECT(1);
    return all;
}

static void make_constants(void)
{
    static const char *const type[] = {"VALUE"};
    static const char *const names[] = {"type", "value", "success", "time", "tag"};
    static const char *const times[] = {
        "user.self", "sys.self", "elapsed", "user.child", "sys.child",
    };
    static const char *const time_class[] = {"proc_time"};
    static const char *const indexed[] = {"node", "value"};

    if (constants)
        return;
    SEXP list = PROTECT(Rf_allocVector(VECSXP, CONSTANTS));
    SET_VECTOR_ELT(list, TYPE, strings(1, type));
    SET_VECTOR_ELT(list, NAMES, strings(5, names));
    SET_VECTOR_ELT(list, TIME_NAMES, strings(5, times));
    SET_VECTOR_ELT(list, TIME_CLASS, strings(1, time_class));
    SET_VECTOR_ELT(list, INDEXED_NAMES, strings(2, indexed));
    R_PreserveObject(list);
    constants = list;
    UNPROTECT(1);
}

/* Returns the answer to a task, as parallel's recvData() does. `value` and `tag` must be protected. The result is not
 * protected. R may jump. */
SEXP rustcluster_answer(void *value, int success, const double time[5], void *tag)
{
    make_constants();
    SEXP answer = PROTECT(Rf_allocVector(VECSXP, 5));
    SEXP times = Rf_allocVector(REALSXP, 5);

    SET_VECTOR_ELT(answer, 3, times);
    for (int i = 0; i < 5; i++)
        REAL(times)[i] = time[i];
    Rf_setAttrib(times, R_NamesSymbol, VECTOR_ELT(constants, TIME_NAMES));
    Rf_setAttrib(times, R_ClassSymbol, VECTOR_ELT(constants, TIME_CLASS));
    SET_VECTOR_ELT(answer, 0, VECTOR_ELT(constants, TYPE));
    SET_VECTOR_ELT(answer, 1, (SEXP) value);
    SET_VECTOR_ELT(answer, 2, Rf_ScalarLogical(success));
    SET_VECTOR_ELT(answer, 4, (SEXP) tag);
    Rf_setAttrib(answer, R_NamesSymbol, VECTOR_ELT(constants, NAMES));
    UNPROTECT(1);
    return answer;
}

/* Returns an answer with the index of its node, as parallel's recvOneData() does. `answer` must be protected. The
 * result is not protected. R may jump. */
SEXP rustcluster_indexed_answer(int node, void *answer)
{
    make_constants();
    SEXP indexed = PROTECT(Rf_allocVector(VECSXP, 2));

    SET_VECTOR_ELT(indexed, 0, Rf_ScalarInteger(node));
    SET_VECTOR_ELT(indexed, 1, (SEXP) answer);
    Rf_setAttrib(indexed, R_NamesSymbol, VECTOR_ELT(constants, INDEXED_NAMES));
    UNPROTECT(1);
    return indexed;
}

/* Returns the value of an answer, or R_NilValue if `answer` is another object. */
SEXP rustcluster_answer_value(void *answer)
{
    SEXP all = (SEXP) answer;

    return TYPEOF(all) == VECSXP && Rf_xlength(all) == 5 ? VECTOR_ELT(all, 1) : R_NilValue;
}

/* Returns whether `answer` is the answer to a task that failed. */
int rustcluster_answer_failed(void *answer)
{
    SEXP all = (SEXP) answer;

    return TYPEOF(all) == VECSXP && Rf_xlength(all) == 5 && Rf_asLogical(VECTOR_ELT(all, 2)) == 0;
}

/* Returns a list of `n` NULLs with names. It is not protected. */
static SEXP list_with_names(int n, const char *const *names)
{
    SEXP list = PROTECT(Rf_allocVector(VECSXP, n));

    Rf_setAttrib(list, R_NamesSymbol, strings(n, names));
    UNPROTECT(1);
    return list;
}

/* Returns parallel's message for a task. The parameters are those of rustcluster_arguments(). The result is not
 * protected. R may jump. */
SEXP rustcluster_message(void *common, void *element, int spread)
{
    static const char *const of_message[] = {"type", "data", "tag"};
    static const char *const of_data[] = {"fun", "args", "return", "tag"};
    SEXP args = PROTECT(rustcluster_arguments(common, element, spread));
    SEXP message = PROTECT(list_with_names(3, of_message)), data = list_with_names(4, of_data);

    SET_VECTOR_ELT(message, 1, data);
    SET_VECTOR_ELT(message, 0, Rf_mkString("EXEC"));
    SET_VECTOR_ELT(data, 0, VECTOR_ELT((SEXP) common, 0));
    SET_VECTOR_ELT(data, 1, args);
    SET_VECTOR_ELT(data, 2, Rf_ScalarLogical(TRUE));
    UNPROTECT(2);
    return message;
}
