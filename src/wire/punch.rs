//! Agreement on a costly way to punch, by relay: who does what, and when it is over.
//!
//! ```text
//!  0      1      2           6          7                      25         26
//! +------+------+-----------+----------+----------------------+----------+----------+
//! | 0x04 | step |  run      |   NAT    |  reflexive endpoint  |   first  |  second  |
//! +------+------+-----------+----------+----------------------+----------+----------+
//! ```
//!
//! The inside of a disco message; a node that does not know it drops it, and nothing follows.

use std::net::SocketAddr;

use super::cursor::{ENDPOINT_LEN, Reader, UnexpectedEnd, endpoint_bytes};

const OFFER: u8 = 1;
const ACCEPT: u8 = 2;
const BUSY: u8 = 3;
const HOPELESS: u8 = 4;
const STOP: u8 = 5;

/// What the sender believes of its own NAT. A hint for who does what, nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatHint {
    /// Not found out.
    Unknown,
    /// One external port for all destinations that were tried, or no NAT.
    Steady,
    /// Another external port for each destination.
    Varies,
}

/// Who does what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The one who offered opens many sockets, the other one probes ports.
    OffererOpens,
    /// The other way round.
    AccepterOpens,
    /// Both take a fresh local port.
    BothMove,
}

impl Way {
    /// Whether many sockets or ports are in play.
    #[must_use]
    pub fn is_birthday(self) -> bool {
        matches!(self, Self::OffererOpens | Self::AccepterOpens)
    }

    fn code(self) -> u8 {
        match self {
            Self::OffererOpens => 1,
            Self::AccepterOpens => 2,
            Self::BothMove => 3,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::OffererOpens, Self::AccepterOpens, Self::BothMove]
            .into_iter()
            .find(|way| way.code() == code)
    }
}

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// "The cheap ways have failed. Shall we?"
    Offer {
        /// Birthday probing is switched on here.
        birthday: bool,
        /// How often this was tried before, so that the next way differs.
        tries: u8,
    },
    /// "Yes, like this, now."
    Accept {
        /// Like this.
        way: Way,
    },
    /// "Not now."
    Busy,
    /// "There is no way that could work."
    Hopeless,
    /// "It is over."
    Stop {
        /// The sender has found a path.
        found: bool,
    },
}

/// A step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Punch {
    /// What is said.
    pub step: Step,
    /// The run that it is about; chosen by who offers.
    pub run: u32,
    /// The NAT of the sender.
    pub nat: NatHint,
    /// Where the server sees the sender's main socket.
    pub reflexive: Option<SocketAddr>,
}

impl Punch {
    /// Appends everything behind the type.
    pub(super) fn encode_into(&self, bytes: &mut Vec<u8>) {
        let (step, first, second) = match self.step {
            Step::Offer { birthday, tries } => (OFFER, u8::from(birthday), tries),
            Step::Accept { way } => (ACCEPT, way.code(), 0),
            Step::Busy => (BUSY, 0, 0),
            Step::Hopeless => (HOPELESS, 0, 0),
            Step::Stop { found } => (STOP, u8::from(found), 0),
        };
        let nat = match self.nat {
            NatHint::Unknown => 0,
            NatHint::Steady => 1,
            NatHint::Varies => 2,
        };
        bytes.push(step);
        bytes.extend_from_slice(&self.run.to_be_bytes());
        bytes.push(nat);
        bytes.extend_from_slice(&self.reflexive.map_or([0; ENDPOINT_LEN], endpoint_bytes));
        bytes.extend_from_slice(&[first, second]);
    }

    /// Reads everything behind the type; none when it says what we do not know.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Option<Self>, UnexpectedEnd> {
        let step = reader.u8()?;
        let run = reader.u32()?;
        let nat = match reader.u8()? {
            1 => NatHint::Steady,
            2 => NatHint::Varies,
            _ => NatHint::Unknown,
        };
        let reflexive = reader.endpoint()?;
        let (first, second) = (reader.u8()?, reader.u8()?);
        let step = match step {
            OFFER => Some(Step::Offer { birthday: first & 1 == 1, tries: second }),
            ACCEPT => Way::from_code(first).map(|way| Step::Accept { way }),
            BUSY => Some(Step::Busy),
            HOPELESS => Some(Step::Hopeless),
            STOP => Some(Step::Stop { found: first & 1 == 1 }),
            _ => None,
        };
        let reflexive = (reflexive.port() != 0).then_some(reflexive);
        Ok(step.map(|step| Self { step, run, nat, reflexive }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_survives() {
        let ways = [Way::OffererOpens, Way::AccepterOpens, Way::BothMove];
        let mut steps = vec![
            Step::Offer { birthday: true, tries: 3 },
            Step::Offer { birthday: false, tries: 255 },
            Step::Busy,
            Step::Hopeless,
            Step::Stop { found: true },
            Step::Stop { found: false },
        ];
        steps.extend(ways.map(|way| Step::Accept { way }));
        for step in steps {
            for nat in [NatHint::Unknown, NatHint::Steady, NatHint::Varies] {
                for reflexive in [None, Some("203.0.113.7:4000".parse().unwrap())] {
                    let punch = Punch { step, run: 0xdead_beef, nat, reflexive };
                    let mut bytes = Vec::new();
                    punch.encode_into(&mut bytes);
                    assert_eq!(bytes.len(), 26);
                    assert!(
                        matches!(Punch::decode(&mut Reader(&bytes)), Ok(Some(it)) if it == punch)
                    );
                }
            }
        }
    }

    #[test]
    fn what_a_newer_node_says_is_no_error_of_its_bytes() {
        let punch = Punch { step: Step::Busy, run: 1, nat: NatHint::Steady, reflexive: None };
        let mut bytes = Vec::new();
        punch.encode_into(&mut bytes);
        bytes[0] = 9;
        assert!(matches!(Punch::decode(&mut Reader(&bytes)), Ok(None)));
        bytes[0] = ACCEPT;
        bytes[24] = 9;
        assert!(matches!(Punch::decode(&mut Reader(&bytes)), Ok(None)));
        assert!(Punch::decode(&mut Reader(&bytes[..25])).is_err());
    }
}
