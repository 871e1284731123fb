"""A clock of one process tree that is set forward or back while it runs; the machine's own clock stays.

A small library is compiled and loaded before libc (LD_PRELOAD). It shifts what `clock_gettime`, `gettimeofday` and
`time` report of the date. Clocks that measure durations stay, as they do where a real clock is set.
"""

import platform
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *shift;
__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("VECTORCLM_CHAOS_CLOCK");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) shift = page;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, clock, now);
    if (code == 0 && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *shift;
    return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    int code = clock_gettime(CLOCK_REALTIME, &found);
    if (now) { now->tv_sec = found.tv_sec; now->tv_usec = found.tv_nsec / 1000; }
    return code;
}
time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


def problem() -> str:
    """Why no clock can be shifted here; empty where it can."""
    if platform.system() != "Linux" or platform.architecture()[0] != "64bit":
        return "clocks are shifted on 64-bit Linux only"
    return "" if shutil.which("cc") else "no C compiler here: install cc"


class ShiftedClock:
    """The clock of the processes that get `environment`; `set` shifts it at once."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock.shift"
        self.set(0)
        if not library.exists():
            part = library.with_suffix(".part")
            command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-o", str(part), "-"]
            subprocess.run(command, input=SOURCE.encode(), check=True, capture_output=True)
            part.rename(library)
        self.environment = {"LD_PRELOAD": str(library), "VECTORCLM_CHAOS_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """Shift the clock by so many seconds from the true time."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))
