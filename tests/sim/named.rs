//! Scenarios with a name and a bound in virtual time.
