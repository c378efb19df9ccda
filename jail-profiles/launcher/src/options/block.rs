//! `-drive` and `-blockdev`.

use crate::cli::{Params, Problem};

/// A `-drive`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its id.
    pub id: Option<String>,
    /// Where; none for an empty drive.
    pub file: Option<String>,
    /// Nobody writes.
    pub read_only: bool,
    /// `if=virtio`: it comes with a device.
    pub with_device: bool,
}

/// A `-blockdev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// What is below.
    pub below: Below,
    /// Nobody writes.
    pub read_only: bool,
}

/// What is below a block node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Below {
    /// A file or a block device.
    Path(String),
    /// The node of this name.
    Node(String),
}

/// A `-drive`.
pub fn drive(params: &Params) -> Result<Drive, Problem> {
    let with_device = match params.text("if") {
        None | Some("virtio") => true,
        Some("none") => false,
        Some(other) => return Err(Problem::DriveInterface(other.to_owned())),
    };
    if let Some(other) = params.text("format").filter(|format| *format != "raw") {
        return Err(Problem::DriveFormat(other.to_owned()));
    }
    let text = |name| params.text(name).map(str::to_owned);
    let read_only = params.flag("read-only").or_else(|| params.flag("readonly")).unwrap_or(false);
    Ok(Drive { id: text("id"), file: text("file").filter(|f| !f.is_empty()), read_only, with_device })
}

/// A `-blockdev`.
pub fn node(params: &Params) -> Result<Node, Problem> {
    let text = |name: &'static str| params.text(name).map(str::to_owned);
    let needed = |name| text(name).ok_or(Problem::MissingParameter(name));
    let below = match (params.text("driver"), text("file")) {
        (Some("raw"), Some(node)) => Below::Node(node),
        (Some("raw"), None) => match params.text("file.driver") {
            None => return Err(Problem::MissingParameter("file")),
            Some("file" | "host_device") => Below::Path(needed("file.filename")?),
            Some(other) => return Err(Problem::BadValue("file.driver", other.to_owned())),
        },
        _ => Below::Path(needed("filename")?),
    };
    let name = text("node-name").ok_or(Problem::NoNodeName)?;
    Ok(Node { name, below, read_only: params.flag("read-only").unwrap_or(false) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::devices::{BLOCKDEV, DRIVE};

    fn a_drive(text: &str) -> Result<Drive, String> {
        Params::parse(&DRIVE, text).and_then(|params| drive(&params)).map_err(|e| e.to_string())
    }

    fn a_node(text: &str) -> Result<Node, String> {
        Params::parse_kinds(&BLOCKDEV, text).and_then(|params| node(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn drives() {
        let drive = |id: Option<&str>, file: Option<&str>, read_only, with_device| {
            Ok(Drive { id: id.map(str::to_owned), file: file.map(str::to_owned), read_only, with_device })
        };
        assert_eq!(
            a_drive("if=none,id=d,file=/a,,b,format=raw"),
            drive(Some("d"), Some("/a,b"), false, false)
        );
        assert_eq!(a_drive("file=/a,readonly=on"), drive(None, Some("/a"), true, true));
        assert_eq!(a_drive("if=virtio,id=d,read-only=on"), drive(Some("d"), None, true, true));
        for (text, error) in [
            ("if=foo,file=/a", "unsupported bus type 'foo'"),
            ("if=ide,file=/a", "unsupported bus type 'ide'"),
            ("file=/a,format=qcow2", "Unknown driver 'qcow2'"),
            ("file=/a,cache=none", "Invalid parameter 'cache'"),
        ] {
            assert_eq!(a_drive(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn nodes() {
        let path = || Below::Path("/a".to_owned());
        let node = |below, read_only| Ok(Node { name: "n".to_owned(), below, read_only });
        assert_eq!(a_node("file,node-name=n,filename=/a"), node(path(), false));
        assert_eq!(a_node("driver=host_device,node-name=n,filename=/a,read-only=on"), node(path(), true));
        assert_eq!(a_node("raw,node-name=n,file=f"), node(Below::Node("f".to_owned()), false));
        assert_eq!(a_node("raw,node-name=n,file.driver=file,file.filename=/a"), node(path(), false));
        for (text, error) in [
            ("driver=foo,node-name=a", "Parameter 'driver' does not accept value 'foo'"),
            ("node-name=a", "Parameter 'driver' is missing"),
            ("raw", "Parameter 'file' is missing"),
            ("file,node-name=a", "Parameter 'filename' is missing"),
            ("file,filename=/a", "'node-name' must be specified for the root node"),
            ("file,node-name=a,filename=/a,foo=1", "Parameter 'foo' is unexpected"),
            (
                "raw,node-name=a,file.driver=file,file.filename=/a,file.foo=1",
                "Parameter 'file.foo' is unexpected",
            ),
        ] {
            assert_eq!(a_node(text).unwrap_err(), error, "{text}");
        }
    }
}
