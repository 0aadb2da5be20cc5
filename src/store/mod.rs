//! What has to survive: small state files, and the server's log of records.
//!
//! Nothing here knows what a record means.

pub mod files;
