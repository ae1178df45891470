// Call a function of a shared library: LIBRARY FUNCTION NUMBER ARGUMENT... An argument is an integer, or a file whose
// bytes are passed by address and written back. NUMBER is the function's float, if it has one. On x86-64 and aarch64 a
// float goes into a register of its own, and an integer or address into another or into 8 bytes of the stack.

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int count, char **arguments) {
    constexpr int FIRST = 4, MOST = 26;
    void *library = dlopen(arguments[1], RTLD_NOW), *function = library ? dlsym(library, arguments[2]) : nullptr;
    if (function == nullptr || count - FIRST > MOST) {
        fprintf(stderr, "%s\n", function == nullptr ? dlerror() : "too many arguments");
        return 1;
    }
    std::vector<char> memory[MOST];
    long a[MOST] = {};
    for (int i = 0; i < count - FIRST; i++) {
        const std::string text = arguments[FIRST + i];
        if (text.find('/') == std::string::npos) {
            a[i] = std::atol(text.c_str());
            continue;
        }
        std::ifstream file(text, std::ios::binary);
        memory[i].assign(std::istreambuf_iterator<char>(file), {});
        a[i] = (long)memory[i].data();
    }
    typedef long L;
    const auto call = (void (*)(float, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L))function;
    call(std::atof(arguments[3]), a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
         a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25]);
    for (int i = 0; i < count - FIRST; i++)
        if (!memory[i].empty()) std::ofstream(arguments[FIRST + i], std::ios::binary).write(memory[i].data(), memory[i].size());
}
