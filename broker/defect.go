package broker

// defect names a way to break the promise that the model checker and the
// kill tests must find.
type defect int32

const (
	_                   defect = iota
	faultAckEarly              // 1: a PUBACK or PUBREC leaves before the commit
	faultPubcompEarly          // 2: a PUBCOMP leaves before the identifier's release is durable
	faultSeqReuse              // 3: a restart uses sequence numbers again
	faultPacketIDReuse         // 4: a packet identifier is used while an old entry still holds it
	faultSubackEarly           // 5: a SUBACK leaves before the subscription is durable
	faultPubrelEarly           // 6: a PUBREL leaves before the PUBREC is durable
	faultDeliverEarly          // 7: a QoS 2 delivery leaves before it is durable
	faultSplitInbound          // 8: a QoS 2 identifier is committed apart from its message
	faultOrphanEarly           // 9: what a share group's member leaves is given up before another has it
	faultCompactEarly          // 10: a segment is written anew without what is on its way to another member
	faultOvertake              // 11: what is in memory overtakes what only the disk has
	faultCompactSpilled        // 12: a segment is written anew without what only the disk has
	faultDropOvertakes         // 13: a segment is given up while what another member has of it is not durable
	faultLoadBlind             // 14: what was read is taken for all that the disk has, whatever was left to it meanwhile
)
