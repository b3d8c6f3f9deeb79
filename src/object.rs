//! Files that are read or written whole: on a disk, in an object store, behind HTTP.

mod error;
mod find;
mod parts;
mod read;
mod store;
mod uri;
mod write;

pub use error::ObjectError;
pub use find::{Found, find};
pub use read::{Chunks, SourceFile};
pub use uri::{FileUri, FileUriError, KEYS, Store, StoreCredentials};
pub use write::{Destination, Draft};
