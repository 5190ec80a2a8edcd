#include "mudsc/permute.hpp"
