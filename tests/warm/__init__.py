"""Commands under test as processes that do not begin with seconds of imports."""
