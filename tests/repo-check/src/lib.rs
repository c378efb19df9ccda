//! Rules of the repository that no lint knows: licences, sizes, who may depend on whom, where unsafe code is.
//! The crate is nothing but its tests.

#[cfg(test)]
mod layout;
#[cfg(test)]
mod licence;
#[cfg(test)]
mod metadata;
#[cfg(test)]
mod specification;
