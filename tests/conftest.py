"""What all tests share."""

from hypothesis import settings

# Speed is measured in benchmarks/, never asserted by a test.
settings.register_profile("memplan", deadline=None)
settings.load_profile("memplan")
