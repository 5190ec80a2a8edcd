#include "mudsc/zip.hpp"
