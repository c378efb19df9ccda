//! Descriptions of types, and the macros that define a Rust type together with its description.

use serde_json::Value;

/// A QAPI type.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// A type built into QAPI.
    Builtin(Builtin),
    /// An enumeration.
    Enum(&'static Enum),
    /// An array of elements of one type.
    Array(&'static Type),
    /// A struct or a union.
    Object(&'static Object),
    /// A struct that has members of its own type: named by a function, because no constant contains itself.
    Recursive(fn() -> &'static Object),
}

/// A built-in type. Introspection shows every integer type as `int`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// Text.
    Str,
    /// A floating-point number.
    Number,
    /// A signed 64-bit integer.
    Int,
    /// A boolean.
    Bool,
    /// Anything.
    Any,
}

/// An enumeration.
#[derive(Debug)]
pub struct Enum {
    /// QEMU's name of it.
    pub name: &'static str,
    /// Its values.
    pub values: &'static [&'static str],
}

/// A struct, or a union if it has a tag.
#[derive(Debug)]
pub struct Object {
    /// QEMU's name of it.
    pub name: &'static str,
    /// Its members, in the order in which they are checked.
    pub members: &'static [Member],
    /// The variants of a union.
    pub union: Option<Union>,
}

/// The variant part of a union.
#[derive(Debug)]
pub struct Union {
    /// The member, of an enumeration type, that selects the variant.
    pub tag: &'static str,
    /// Tag values that add members; the others add none.
    pub variants: &'static [(&'static str, &'static Object)],
}

/// A member of a struct.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be left out.
    pub optional: bool,
    /// Special features, such as `deprecated`.
    pub features: &'static [&'static str],
}

/// The type without members.
pub static EMPTY: Object = Object { name: "q_empty", members: &[], union: None };

/// A Rust type that has a QAPI description.
pub trait Described {
    /// The description.
    const TYPE: Type;
    /// Whether a member of this type may be left out.
    const OPTIONAL: bool = false;
    /// Whether it is left out.
    fn is_absent(&self) -> bool {
        false
    }
}

impl Described for i64 {
    const TYPE: Type = Type::Builtin(Builtin::Int);
}
impl Described for f64 {
    const TYPE: Type = Type::Builtin(Builtin::Number);
}
impl Described for bool {
    const TYPE: Type = Type::Builtin(Builtin::Bool);
}
impl Described for String {
    const TYPE: Type = Type::Builtin(Builtin::Str);
}
impl Described for &'static str {
    const TYPE: Type = Type::Builtin(Builtin::Str);
}
impl Described for Value {
    const TYPE: Type = Type::Builtin(Builtin::Any);
}
impl<T: Described> Described for Vec<T> {
    const TYPE: Type = Type::Array(&T::TYPE);
}
impl<T: Described> Described for Option<T> {
    const TYPE: Type = T::TYPE;
    const OPTIONAL: bool = true;
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

/// Defines an enumeration and its description.
macro_rules! qapi_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$value_meta:meta])* $text:literal $variant:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$value_meta])* #[serde(rename = $text)] $variant,)+ }

        impl $crate::schema::Described for $name {
            const TYPE: $crate::schema::Type = {
                static DESCRIPTION: $crate::schema::Enum = $crate::schema::Enum {
                    name: stringify!($name), values: &[$($text),+],
                };
                $crate::schema::Type::Enum(&DESCRIPTION)
            };
        }
    };
}

/// Defines a struct and its description. A union has `by TAG { VALUE => STRUCT, ... }` after its
/// members; the Rust struct holds the members that all variants have.
macro_rules! qapi_struct {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$member_meta:meta])* $text:literal $member:ident: $ty:ty $([$($feature:literal),+])?,)*
    } $(by $tag:literal { $($value:literal => $variant:ty,)* })?) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        pub struct $name {
            $($(#[$member_meta])*
            #[serde(rename = $text, skip_serializing_if = "Described::is_absent")]
            pub $member: $ty,)*
        }

        impl $name {
            /// What the schema says of this type.
            pub const DESCRIPTION: &'static $crate::schema::Object = {
                static DESCRIPTION: $crate::schema::Object = $crate::schema::Object {
                    name: stringify!($name),
                    members: &[$($crate::schema::Member {
                        name: $text,
                        ty: <$ty as $crate::schema::Described>::TYPE,
                        optional: <$ty as $crate::schema::Described>::OPTIONAL,
                        features: &[$($($feature),+)?],
                    }),*],
                    union: qapi_struct!(@union $($tag { $($value => $variant,)* })?),
                };
                &DESCRIPTION
            };
        }

        impl $crate::schema::Described for $name {
            const TYPE: $crate::schema::Type = $crate::schema::Type::Object(Self::DESCRIPTION);
        }
    };
    (@union) => { None };
    (@union $tag:literal { $($value:literal => $variant:ty,)* }) => {
        Some($crate::schema::Union { tag: $tag, variants: &[$(($value, <$variant>::DESCRIPTION)),*] })
    };
}

pub(crate) use {qapi_enum, qapi_struct};
