//! Attacks on the walls of a jail, from inside by the prisoner, and from outside by reading what
//! the kernel says of the prisoner, the broker and the real VMM.

mod ask;
mod ending;
mod helper;
mod inherited;
mod inside;
mod machine;
mod outside;
