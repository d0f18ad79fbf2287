//! The generic event device (ACPI 6.5, section 5.6.9): one interrupt for everything that the guest is told of.

use acpi_tables::aml::{
    And, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    NotEqual, OpRegion, OpRegionSpace, Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::dsdt::{device_in_sb, edge, window};
use crate::boot::{Error, GedInfo};
use crate::devices::acpi::Event;

/// What a guest does about an event.
pub(super) struct Handler {
    /// The event.
    pub(super) event: Event,
    /// Statements of a method's body.
    pub(super) code: Vec<u8>,
}

/// Statements that are bytes already.
pub(super) struct Code<'a>(pub(super) &'a [u8]);

impl Aml for Code<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

/// Appends the device. Its interrupt runs `_EVT`, which reads the pending events, clearing them, and runs
/// the handler of each.
pub(super) fn generic_event_device(
    body: &mut Vec<u8>,
    ged: &GedInfo,
    handlers: &[Handler],
) -> Result<(), Error> {
    let (base, size) = window(ged.event_register, 4)?;
    let region = OpRegion::new("EREG".into(), OpRegionSpace::SystemMemory, &base, &size);
    let field = Field::new(
        "EREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"ESEL", 32)],
    );
    let pending = Local(0);
    let register: Path = "ESEL".into();
    let read = Store::new(&pending, &register);
    let bits: Vec<u32> = handlers.iter().map(|h| h.event as u32).collect();
    let is_pending: Vec<And> = bits
        .iter()
        .map(|bit| And::new(&ZERO, &pending, bit))
        .collect();
    let is_pending: Vec<NotEqual> = is_pending
        .iter()
        .map(|bit| NotEqual::new(bit, &ZERO))
        .collect();
    let codes: Vec<Code> = handlers.iter().map(|h| Code(&h.code)).collect();
    let branches: Vec<If> = is_pending
        .iter()
        .zip(&codes)
        .map(|(is_pending, code)| If::new(is_pending, vec![code]))
        .collect();
    let mut statements: Vec<&dyn Aml> = vec![&read];
    statements.extend(branches.iter().map(|branch| branch as &dyn Aml));
    let event = Method::new("_EVT".into(), 1, true, statements);
    let interrupt = edge(ged.gsi);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    device_in_sb(
        body,
        "GED_",
        &"ACPI0013",
        0,
        &[&region, &field, &event],
        Some(resources),
    );
    Ok(())
}
