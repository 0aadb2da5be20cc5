//! Words of the domain: parse, print, compare, nothing else.
//!
//! A value of one of these types was checked when it was made and is valid for ever.
