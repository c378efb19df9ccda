//! `qapi/char.json`.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_struct! {
    /// A character device.
    ChardevInfo {
        /// Its id.
        "label" label: String,
        /// What it is connected to, in words.
        "filename" filename: String,
        /// Whether its front end has it open.
        "frontend-open" frontend_open: bool,
    }
}

qapi_enum! {
    /// Kind of a character device.
    #[expect(missing_docs, reason = "each is the kind of its name")]
    ChardevBackendKind {
        "file" File,
        "serial" Serial,
        "parallel" Parallel,
        "pipe" Pipe,
        "socket" Socket,
        "udp" Udp,
        "pty" Pty,
        "null" Null,
        "mux" Mux,
        "msmouse" Msmouse,
        "wctablet" Wctablet,
        "braille" Braille,
        "testdev" Testdev,
        "stdio" Stdio,
        "console" Console,
        "spicevmc" Spicevmc,
        "spiceport" Spiceport,
        "vc" Vc,
        "ringbuf" Ringbuf,
        "memory" Memory,
    }
}

qapi_struct! {
    /// What all kinds have.
    ChardevCommon {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
    }
}

qapi_struct! {
    /// A file.
    ChardevFile {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Where input comes from.
        "in" input: Option<String>,
        /// Where output goes.
        "out" output: String,
        /// It is appended.
        "append" append: Option<bool>,
    }
}

qapi_struct! {
    /// A device of the host, or a pipe.
    ChardevHostdev {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its path.
        "device" device: String,
    }
}

qapi_enum! {
    /// Kind of a socket's address.
    SocketAddressType {
        /// TCP.
        "inet" Inet,
        /// A unix socket.
        "unix" Unix,
        /// A vsock.
        "vsock" Vsock,
        /// A descriptor.
        "fd" Fd,
    }
}

qapi_struct! {
    /// Address of a TCP socket.
    InetSocketAddress {
        /// Host.
        "host" host: String,
        /// Port.
        "port" port: String,
        /// The port is a number.
        "numeric" numeric: Option<bool>,
        /// The highest port to try.
        "to" to: Option<i64>,
        /// IPv4 is wanted, or not.
        "ipv4" ipv4: Option<bool>,
        /// IPv6 is wanted, or not.
        "ipv6" ipv6: Option<bool>,
        /// Dead peers are found out.
        "keep-alive" keep_alive: Option<bool>,
    }
}

qapi_struct! {
    /// Address of a unix socket.
    UnixSocketAddress {
        /// Its path.
        "path" path: String,
    }
}

qapi_struct! {
    /// Address of a vsock.
    VsockSocketAddress {
        /// Context id.
        "cid" cid: String,
        /// Port.
        "port" port: String,
    }
}

qapi_struct! {
    /// Name or number of a descriptor.
    FdSocketAddress {
        /// It.
        "str" name: String,
    }
}

qapi_struct! {
    /// Wraps an address.
    InetSocketAddressWrapper {
        /// It.
        "data" data: InetSocketAddress,
    }
}

qapi_struct! {
    /// Wraps an address.
    UnixSocketAddressWrapper {
        /// It.
        "data" data: UnixSocketAddress,
    }
}

qapi_struct! {
    /// Wraps an address.
    VsockSocketAddressWrapper {
        /// It.
        "data" data: VsockSocketAddress,
    }
}

qapi_struct! {
    /// Wraps an address.
    FdSocketAddressWrapper {
        /// It.
        "data" data: FdSocketAddress,
    }
}

qapi_struct! {
    /// Address of a socket, as it has been since before there were flat unions.
    SocketAddressLegacy {
        /// Its kind.
        "type" kind: SocketAddressType,
    } by "type" {
        "inet" => InetSocketAddressWrapper,
        "unix" => UnixSocketAddressWrapper,
        "vsock" => VsockSocketAddressWrapper,
        "fd" => FdSocketAddressWrapper,
    }
}

qapi_struct! {
    /// A stream socket.
    ChardevSocket {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its address.
        "addr" addr: SocketAddressLegacy,
        /// Credentials of TLS.
        "tls-creds" tls_creds: Option<String>,
        /// Who may connect with TLS.
        "tls-authz" tls_authz: Option<String>,
        /// It listens: unless it is false.
        "server" server: Option<bool>,
        /// A client is waited for.
        "wait" wait: Option<bool>,
        /// Small packets are sent at once.
        "nodelay" nodelay: Option<bool>,
        /// Telnet is spoken.
        "telnet" telnet: Option<bool>,
        /// Telnet 3270 is spoken.
        "tn3270" tn3270: Option<bool>,
        /// WebSocket is spoken.
        "websocket" websocket: Option<bool>,
        /// Seconds between two tries to connect, 0 for one try.
        "reconnect" reconnect: Option<i64>,
    }
}

qapi_struct! {
    /// A datagram socket.
    ChardevUdp {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Where it sends to.
        "remote" remote: SocketAddressLegacy,
        /// Where it receives.
        "local" local: Option<SocketAddressLegacy>,
    }
}

qapi_struct! {
    /// Several front ends on one character device.
    ChardevMux {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// That one.
        "chardev" chardev: String,
    }
}

qapi_struct! {
    /// The terminal.
    ChardevStdio {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its signals have effect.
        "signal" signal: Option<bool>,
    }
}

qapi_struct! {
    /// A channel of SPICE.
    ChardevSpiceChannel {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its kind.
        "type" kind: String,
    }
}

qapi_struct! {
    /// A port of SPICE.
    ChardevSpicePort {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its name.
        "fqdn" fqdn: String,
    }
}

qapi_struct! {
    /// A console of the graphical display.
    ChardevVC {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// In pixels.
        "width" width: Option<i64>,
        /// In pixels.
        "height" height: Option<i64>,
        /// In characters.
        "cols" cols: Option<i64>,
        /// In characters.
        "rows" rows: Option<i64>,
    }
}

qapi_struct! {
    /// A buffer.
    ChardevRingbuf {
        /// A file that gets a copy of the output.
        "logfile" logfile: Option<String>,
        /// The file is appended to.
        "logappend" logappend: Option<bool>,
        /// Its size in bytes.
        "size" size: Option<i64>,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevFileWrapper {
        /// It.
        "data" data: ChardevFile,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevHostdevWrapper {
        /// It.
        "data" data: ChardevHostdev,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevSocketWrapper {
        /// It.
        "data" data: ChardevSocket,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevUdpWrapper {
        /// It.
        "data" data: ChardevUdp,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevCommonWrapper {
        /// It.
        "data" data: ChardevCommon,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevMuxWrapper {
        /// It.
        "data" data: ChardevMux,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevStdioWrapper {
        /// It.
        "data" data: ChardevStdio,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevSpiceChannelWrapper {
        /// It.
        "data" data: ChardevSpiceChannel,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevSpicePortWrapper {
        /// It.
        "data" data: ChardevSpicePort,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevVCWrapper {
        /// It.
        "data" data: ChardevVC,
    }
}

qapi_struct! {
    /// Wraps what its kind has.
    ChardevRingbufWrapper {
        /// It.
        "data" data: ChardevRingbuf,
    }
}

qapi_struct! {
    /// What a character device is connected to.
    ChardevBackend {
        /// Its kind.
        "type" kind: ChardevBackendKind,
    } by "type" {
        "file" => ChardevFileWrapper,
        "serial" => ChardevHostdevWrapper,
        "parallel" => ChardevHostdevWrapper,
        "pipe" => ChardevHostdevWrapper,
        "socket" => ChardevSocketWrapper,
        "udp" => ChardevUdpWrapper,
        "pty" => ChardevCommonWrapper,
        "null" => ChardevCommonWrapper,
        "mux" => ChardevMuxWrapper,
        "msmouse" => ChardevCommonWrapper,
        "wctablet" => ChardevCommonWrapper,
        "braille" => ChardevCommonWrapper,
        "testdev" => ChardevCommonWrapper,
        "stdio" => ChardevStdioWrapper,
        "console" => ChardevCommonWrapper,
        "spicevmc" => ChardevSpiceChannelWrapper,
        "spiceport" => ChardevSpicePortWrapper,
        "vc" => ChardevVCWrapper,
        "ringbuf" => ChardevRingbufWrapper,
        "memory" => ChardevRingbufWrapper,
    }
}

qapi_struct! {
    /// Arguments of `chardev-add` and `chardev-change`. What the union's variants add stays JSON.
    ChardevAddArg {
        /// Its id.
        "id" id: String,
        /// What it is connected to.
        "backend" backend: ChardevBackend,
    }
}

qapi_struct! {
    /// What `chardev-add` and `chardev-change` return.
    ChardevReturn {
        /// Path of the pseudo-terminal, if it is one.
        "pty" pty: Option<String>,
    }
}

qapi_struct! {
    /// Arguments of `chardev-remove`.
    ChardevRemoveArg {
        /// Its id.
        "id" id: String,
    }
}
