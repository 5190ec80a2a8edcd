#include "mudsc/assignment.hpp"
