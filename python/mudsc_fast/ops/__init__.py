"""The ops: public functions that check their input and call the kernel that `_dispatch` chooses."""
