#include "mudsc/correlation.hpp"
