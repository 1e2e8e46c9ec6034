"""How many threads numpy's matrix products use in a process that trains: one."""

from threadpoolctl import threadpool_limits


def use_one_thread() -> None:
    """Keep this process's matrix products on one thread from now on.

    For two reasons: the order of additions, and so the last bits, must not depend on the machine's number of cores; and several
    processes that each start a thread per core wait for each other (measured on two busy cores: a minibatch of 1,024 rows took
    60 ms with two threads each, 2.8 ms with one).
    """
    threadpool_limits(1)
