// How the programs of this folder say what is wrong: with three numbers, and exit code 1.
#pragma once
#include <cstdio>
#include <cstdlib>

inline void require(bool right, const char* what, long a, long b, long c) {
    if (right) return;
    std::printf("%s: %ld, %ld, %ld\n", what, a, b, c);
    std::fflush(stdout);
    std::_Exit(1);  // at once, on whatever stack: emulated threads have their own
}
