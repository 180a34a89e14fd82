//! Being written.

pub mod codec;
pub mod decoder;
pub mod frame;
pub mod request;
pub mod response;
