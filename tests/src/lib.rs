//! Fixtures for the tests and the demo.
