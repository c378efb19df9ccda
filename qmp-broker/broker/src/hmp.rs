//! `human-monitor-command`: lines that a person would type, as a thin layer over the QMP commands.
//!
//! [`table`] has the commands, [`parse`] finds the one that a line means. What it prints, errors too,
//! is the value of the reply, in lines that end in CRLF.

mod parse;
mod show;
mod table;

use std::rc::Rc;

use bulkhead_control_api::core;
use bulkhead_qapi::Error;
use bulkhead_qapi::request::Call;
use bulkhead_qapi::types::misc::HumanMonitorCommandArg;
use serde_json::Value;

use crate::client::Client;
use crate::commands::{Reply, Step};
use crate::hub::Hub;
use crate::policy::Subject;
pub use parse::{Line, parse};

/// Bytes that a line may have: what is wrong with it is told by repeating it.
pub const MAX_LINE: usize = 4096;

/// The monitor of lines. No character device has this name.
const OWN_MONITOR: &str = "";

impl Hub {
    /// Executes the line. The log names the QMP command that it stands for.
    pub(crate) async fn human(
        self: &Rc<Self>,
        client: &Client,
        who: Subject<'_>,
        args: HumanMonitorCommandArg,
    ) -> Reply {
        let line = args.command_line;
        if line.len() > MAX_LINE {
            return Err(Error::generic(format!("Parameter 'command-line' expects at most {MAX_LINE} bytes")));
        }
        let cpu = self.chosen_cpu(client, args.cpu_index).await?;
        let text = match parse(&line) {
            Line::Text(text) => text,
            Line::Call { command, args, show } => {
                let call = Call { command, args };
                let step = self.begin(call, who.role, &mut client.mode()).await?;
                let reply = match step {
                    // As in QEMU, a line has a monitor of its own, to which nobody sends a descriptor.
                    Step::Descriptors(op) => self.descriptors.borrow_mut().execute(op, OWN_MONITOR, || None),
                    step => self.carry_out(client, step).await,
                };
                if command.changes_state() {
                    self.audit.changed(who, command.name, &reply);
                }
                match reply {
                    Ok(value) => show(value, cpu),
                    Err(error) => format!("Error: {}\n", error.desc),
                }
            }
        };
        Ok(Value::String(text.replace('\n', "\r\n")))
    }

    /// The vCPU that a line is about: the first one, unless the client says which.
    async fn chosen_cpu(self: &Rc<Self>, client: &Client, index: Option<i64>) -> Result<i64, Error> {
        let Some(index) = index else { return Ok(0) };
        let cpus = self.carry_out(client, Step::Core(core::Op::Cpus)).await?;
        let count = cpus.as_array().map_or(0, Vec::len);
        match usize::try_from(index) {
            Ok(position) if position < count => Ok(index),
            _ => Err(Error::generic("Parameter 'cpu-index' expects a CPU number")),
        }
    }
}
